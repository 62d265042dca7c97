"""What pipelines that generate and edit sound share: masks, cross-fades, windows, loops, latents between two.

This file travels with the pipelines, hence no import of tonefield, and a name that nobody else uses: diffusers puts
the files of all local repositories into one package.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import numpy as np
import torch
from diffusers.models.downsampling import Downsample2D


Mask = torch.Tensor | np.ndarray | Sequence[bool] | Sequence[tuple[float, float]]
Generators = torch.Generator | list[torch.Generator] | None


# Masks: True where new sound is wanted


def samples_of_spans(spans: Sequence[tuple[float, float]], sample_rate: int, num_samples: int) -> torch.Tensor:
    """The samples between the seconds `start` and `end` of every span: bool, of shape (1, num_samples)."""
    new = torch.zeros(1, num_samples, dtype=torch.bool)
    duration = num_samples / sample_rate
    for start, end in spans:
        if not 0 <= start < end <= duration + 0.5 / sample_rate:
            raise ValueError(f"mask holds ({start:g}, {end:g}) s: use 0 <= start < end <= {duration:g} s.")
        new[:, round(start * sample_rate) : round(end * sample_rate)] = True
    return new


def frame_of_samples(num_samples: int, num_frames: int, hop: int, centred: bool, ring: bool) -> torch.Tensor:
    """The frame that each sample is nearest to; `centred` frames lie on multiples of the hop, others between them."""
    frame = (torch.arange(num_samples) + (hop // 2 if centred else 0)) // hop
    return frame % num_frames if ring else frame.clamp(max=num_frames - 1)


def is_spans(mask: Mask) -> TypeGuard[Sequence[tuple[float, float]]]:
    """Whether a mask is given as (start, end) seconds."""
    return isinstance(mask, (list, tuple)) and len(mask) > 0 and all(np.shape(span) == (2,) for span in mask)


def read_frames(mask: Mask, num_frames: int) -> torch.Tensor:
    """A mask given frame by frame, as bool of shape (1, num_frames) or (batch, num_frames)."""
    new = torch.as_tensor(mask)
    if new.numel() == 0:
        raise ValueError("mask is empty: give spans of seconds, or a boolean for each frame, True where sound is new.")
    if new.dtype != torch.bool:
        raise ValueError(f"mask holds {new.dtype}: give booleans, True where new sound is wanted, or a list of spans.")
    if new.ndim not in (1, 2) or new.shape[-1] != num_frames:
        raise ValueError(f"mask has shape {tuple(new.shape)}: give one boolean for each of {num_frames} frames.")
    return new.reshape(-1, num_frames)


def read_mask(mask: Mask, mel, num_frames: int, num_samples: int, ring: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask over the frames of a mel and the mask over samples, whichever of both it was given for."""
    c = mel.config
    frame = frame_of_samples(num_samples, num_frames, c.hop_length, c.method == "image", ring)
    if not is_spans(mask):
        new_frames = read_frames(mask, num_frames)
        return new_frames, new_frames[:, frame.to(new_frames.device)]
    new_samples = samples_of_spans(mask, c.sample_rate, num_samples)
    new_frames = torch.zeros(1, num_frames, dtype=torch.bool)
    new_frames[0, frame[new_samples[0]]] = True
    return new_frames, new_samples


def distance_to(new: torch.Tensor, ring: bool = False) -> torch.Tensor:
    """Steps from each position to the nearest True in its row: (rows, length) -> float, infinite where none is."""
    length = new.shape[1]
    if ring:
        return distance_to(new.repeat(1, 3))[:, length : 2 * length]
    position = torch.arange(length, dtype=torch.float32, device=new.device).expand_as(new)
    before = position - torch.where(new, position, -math.inf).cummax(1).values
    after = torch.where(new, position, math.inf).flip(1).cummin(1).values.flip(1) - position
    return torch.minimum(before, after)


def beside(new: torch.Tensor, ring: bool) -> torch.Tensor:
    """`new`, of shape (rows, length), and the places next to it."""
    ends = (new[:, -1:], new[:, :1]) if ring else (torch.zeros_like(new[:, :1]),) * 2
    return torch.cat([ends[0], new, ends[1]], dim=1).unfold(1, 3, 1).any(-1)


def crossfade(
    into: torch.Tensor, out_of: torch.Tensor, progress: torch.Tensor, same_phases: bool = False
) -> torch.Tensor:
    """
    From one sound (progress 0) into another (1). The squares of both gains add up to 1, so that the power stays where
    the phases have nothing to do with one another; where they are the same, the gains themselves do. Both gains begin
    and end with slope 0, so that no kink is heard.
    """
    angle = (1 - torch.cos(math.pi * progress)) * (math.pi / 4)
    power = 2 if same_phases else 1
    return angle.sin().pow(power).to(into.dtype) * into + angle.cos().pow(power).to(into.dtype) * out_of


def paste(
    kept: torch.Tensor,
    made: torch.Tensor,
    new: torch.Tensor,
    fade: int,
    ring: bool = False,
    same_phases: bool = False,
) -> torch.Tensor:
    """
    `made` where `new`, `kept` elsewhere, and for `fade` samples around `new` a [`crossfade`].

    All are of shape (batch, samples). More than `fade` samples away from `new`, `kept` comes back bit for bit.
    """
    distance = distance_to(new, ring)
    progress = (distance / (fade + 1)).clamp(max=1)
    return torch.where(distance > fade, kept, crossfade(kept, made, progress, same_phases))


# Loops: time as a ring


def _circular_conv(conv: torch.nn.Conv2d, after_pad: bool, x: torch.Tensor, weight, bias) -> torch.Tensor:
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    if after_pad:  # the module around it has appended a column of zeros
        x = torch.cat([x[..., :-1], x[..., :1]], dim=-1)
    x = torch.nn.functional.pad(x, (left, right, 0, 0), mode="circular")
    x = torch.nn.functional.pad(x, (0, 0, top, bottom))
    return torch.nn.functional.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)


@contextmanager
def circular_in_time(model: torch.nn.Module) -> Iterator[None]:
    """
    While this lasts, the convolutions of a model see time, the last axis of a picture, as a ring.

    Attention without positions, normalisation and resampling by whole factors do not know where a ring begins; padding
    is all that tells convolutional networks. With the context the network commutes with rotations of the ring.
    """
    # Without padding of its own, a strided convolution of diffusers pads outside of the convolution.
    padded_outside = {m.conv for m in model.modules() if isinstance(m, Downsample2D) and m.use_conv and m.padding == 0}
    changed = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    for conv in changed:
        conv._conv_forward = partial(_circular_conv, conv, conv in padded_outside)
    try:
        yield
    finally:
        for conv in changed:
            del conv._conv_forward


def around_ring(length: int, margin: int) -> torch.Tensor:
    """Places on a ring of `length`: once around, with `margin` more before and after."""
    return torch.arange(-margin, length + margin) % length


def decode_ring(decode: Callable, mel: torch.Tensor, hop: int, margin: int, same_phases: bool = False) -> torch.Tensor:
    """
    A loop of frames * hop samples: `decode` the mel (or codes) with `margin` frames of context around it.

    What follows the end is the beginning again, a mel's with other phases. Fading from the one into the other over
    half of the margin makes the beginning the continuation of the end.
    """
    frames = mel.shape[-1]
    waveform = decode(mel[..., around_ring(frames, margin).to(mel.device)])
    length, fade = frames * hop, min(frames, margin // 2) * hop
    loop = waveform[:, margin * hop :][:, :length].clone()
    beyond = waveform[:, margin * hop + length :][:, :fade]
    progress = torch.arange(fade, device=mel.device, dtype=loop.dtype) / fade
    loop[:, :fade] = crossfade(loop[:, :fade], beyond, progress, same_phases)
    return loop


# Sound to mels and back


@dataclass
class Source:
    """Given sound: the mel, and the waveform and the level of 0 dB where there are any, each of as many rows."""

    mel: torch.Tensor
    waveform: torch.Tensor | None = None
    reference: torch.Tensor | None = None


def ring_margin(mel) -> int:
    """Frames of context around a loop: four windows' worth."""
    return 4 * -(-mel.config.n_fft // mel.config.hop_length)


def encode_sound(mel, audio: torch.Tensor, loop: bool) -> Source:
    """What the front end sees of waveforms (batch, samples), or of loops (batch, frames * hop)."""
    if not loop:
        seen, reference = mel.encode(audio, return_reference=True)
        return Source(seen, audio, reference)
    hop, margin = mel.config.hop_length, ring_margin(mel)
    around = around_ring(audio.shape[1], margin * hop).to(audio.device)
    seen, reference = mel.encode(audio[:, around], return_reference=True)
    return Source(seen[..., margin : margin + audio.shape[1] // hop], audio, reference)


# Vocoders: MMAudioVocoder and LTX2Vocoder of diffusers, which are the two generations of BigVGAN

# Frames that a vocoder computes at once, over all rows: about 1.3 GB for the largest that are published.
FRAMES_AT_ONCE = 4096


def check_vocoder(mel, vocoder) -> None:
    """Refuses a vocoder that was trained on other mels than those which it is to make sound of."""
    if vocoder is None:
        return
    if mel is None or mel.config.method != "bigvgan":
        raise ValueError("A vocoder needs a mel of method 'bigvgan', as it was trained on.")
    ours = {name: mel.config[name] for name in ("sample_rate", "n_fft", "hop_length", "n_mels", "f_min", "f_max")}
    ours["f_max"] = ours["f_max"] or mel.config.sample_rate / 2
    theirs = {"n_mels": vocoder.config.get("num_mels") or vocoder.config.get("in_channels")}
    theirs["hop_length"] = math.prod(upsampling(vocoder))
    theirs |= vocoder.config.get("_mel") or {}  # which conversion writes; what is above can be seen on any vocoder
    preset = theirs.pop("preset", None)
    for name, value in theirs.items():
        if value != ours[name]:
            raise ValueError(
                f"The vocoder reads mels of {name}={value:g}, but those of the pipeline have {name}={ours[name]:g}:"
                f" use a vocoder of such mels, or train on the vocoder's{f' (preset {preset})' if preset else ''}."
            )


def upsampling(vocoder) -> list[int]:
    """By how much each stage of a vocoder is longer than the one before."""
    rates = vocoder.config.get("upsample_rates") or vocoder.config.get("upsample_factors")
    if not rates:
        raise ValueError(f"{type(vocoder).__name__} is no vocoder of mels: use an MMAudioVocoder or an LTX2Vocoder.")
    return rates


def receptive_field(vocoder) -> int:
    """Frames before and after a frame that a vocoder's sound of it depends on, rounded up."""
    c, rate, reach = vocoder.config, 1.0, 3.0  # the first convolution has 7 taps
    antialiased = 6  # an activation is up- and downsampled by filters of 12 taps at twice the rate: 3 taps each way
    kernels = c.get("resblock_kernel_sizes") or c.get("resnet_kernel_sizes")
    dilations = c.get("resblock_dilation_sizes") or c.get("resnet_dilations")
    for step, kernel in zip(upsampling(vocoder), c.upsample_kernel_sizes, strict=True):
        reach += kernel / step / 2 / rate + 1 / rate
        rate *= step
        blocks = [
            sum((size - 1) // 2 * (dilation + 1) + 2 * antialiased for dilation in dilated)
            for size, dilated in zip(kernels, dilations, strict=True)
        ]
        reach += max(blocks) / rate
    return math.ceil(reach + (antialiased + 3) / rate)


def vocode(vocoder, log_mels: torch.Tensor) -> torch.Tensor:
    """
    Waveforms (batch, samples) of natural logarithms of magnitudes (batch, n_mels, frames).

    In float32 whatever surrounds it: over its hundred convolutions half precision is heard. Long mels are cut into
    parts that overlap by what a vocoder sees, so that it makes of them what it would make of the whole.
    """
    if vocoder.dtype in (torch.float16, torch.bfloat16):
        vocoder.float()
    hop, margin, frames = math.prod(upsampling(vocoder)), receptive_field(vocoder), log_mels.shape[-1]
    size = min(frames, FRAMES_AT_ONCE)
    with torch.autocast(log_mels.device.type, enabled=False):
        rows = []
        for some in log_mels.to(vocoder.dtype).split(max(1, FRAMES_AT_ONCE // size)):
            parts = []
            for start in range(0, frames, size):
                first = max(0, start - margin)
                seen = some[..., first : start + size + margin]
                if "upsample_factors" in vocoder.config:
                    made = vocoder(seen[:, None], time_last=True)[:, 0]
                else:
                    made = vocoder(seen, return_dict=False)[0][:, 0]
                parts.append(made[:, (start - first) * hop :][:, : size * hop])
            rows.append(torch.cat(parts, dim=1)[:, : frames * hop])
        return torch.cat(rows).float()


def make_sound(
    mel, vocoder, mels: torch.Tensor, generator: Generators, reference: torch.Tensor | None, loop: bool
) -> torch.Tensor:
    """Waveforms of mels, from the vocoder or else the Griffin-Lim algorithm."""

    def decode(mels: torch.Tensor) -> torch.Tensor:
        if vocoder is None:
            return mel.decode(mels, generator=generator, reference=reference)
        low, high = mel.value_range
        log_mels = (mel.unstandardize(mels[:, 0]).clamp(-1, 1) + 1) * ((high - low) / 2) + low
        return vocode(vocoder, log_mels)

    if not loop:
        return decode(mels)
    margin = ring_margin(mel)
    if vocoder is not None:
        # With all that the vocoder sees around the loop, what follows its end is its beginning already.
        margin = max(margin, 2 * receptive_field(vocoder))
    return decode_ring(decode, mels, mel.config.hop_length, margin, same_phases=vocoder is not None)


# Latents


def guided_field(sample: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, config) -> torch.Tensor:
    """What a PFGM network would return for a denoised sample: -sqrt(N) E / (|E| + gamma), E = (x - Dn, r)."""
    radius = (sigma * config.aug_dim**0.5).to(sample).reshape(-1, 1).expand(len(sample), 1)
    field = torch.cat([(sample - denoised).flatten(1), radius], dim=1)
    field = -((field.shape[1] - 1) ** 0.5) * field / (field.norm(dim=1, keepdim=True) + config.gamma)
    last = field[:, -1].reshape(-1, 1, 1, 1).expand(-1, 1, *sample.shape[2:])
    return torch.cat([field[:, :-1].reshape(sample.shape), last], dim=1)


def rescale_guidance(guided: torch.Tensor, towards: torch.Tensor, rescale: float) -> torch.Tensor:
    """Guidance with the spread of the conditional branch (https://huggingface.co/papers/2305.08891, section 3.4)."""
    dims = list(range(1, guided.ndim))
    factor = towards.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return (rescale * factor + 1 - rescale) * guided


def interpolate_latents(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    From `a` to `b` of shape (1, ...): directions on the great circle between them, norms on the geometric path,

        |a|^(1 - w) |b|^w (sin((1 - w) o) a / |a| + sin(w o) b / |b|) / sin(o),    o the angle between them.
    """
    x, y = a.cpu().double().flatten(), b.cpu().double().flatten()
    norm_x, norm_y = x.norm(), y.norm()
    x, y = x / norm_x, y / norm_y
    omega = 2 * torch.atan2((x - y).norm(), (x + y).norm())
    w = weights.cpu().double()[:, None]
    # sin(w o) / sin(o), written so that o = 0 gives w
    from_x = (1 - w) * torch.sinc((1 - w) * omega / math.pi) / torch.sinc(omega / math.pi)
    from_y = w * torch.sinc(w * omega / math.pi) / torch.sinc(omega / math.pi)
    path = norm_x ** (1 - w) * norm_y**w * (from_x * x + from_y * y)
    return path.reshape(-1, *a.shape[1:]).to(a)
