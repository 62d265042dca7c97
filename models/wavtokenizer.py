"""A codec of one codebook for speech and music: SEANet encodes, Vocos with attention decodes."""

import hashlib
import json
import math
from numbers import Integral

import numpy as np
import soxr
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


WINDOW_SECONDS = 20  # of what is encoded or decoded at a time


# Copied from tonefield.models.audio_tokenizer_mulaw.silence_after
def silence_after(waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sounds (batch, samples) without what comes after their lengths."""
    return waveform.masked_fill(torch.arange(waveform.shape[1], device=waveform.device) >= lengths[:, None], 0)


# Copied from tonefield.models.audio_tokenizer_mulaw.prepare_waveform
def prepare_waveform(
    waveform: torch.Tensor, sampling_rate: int, own_rate: int, lengths: torch.Tensor | list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mono float32 sounds (batch, samples) at `own_rate`, silent after their lengths, and the lengths at that rate.

    Channels of (batch, channels, samples) are averaged; other rates are resampled by soxr at high quality.
    """
    if not isinstance(sampling_rate, Integral) or sampling_rate <= 0:
        raise ValueError(f"sampling_rate is a whole number of samples per second, not {sampling_rate!r}.")
    if waveform.ndim == 3:
        waveform = waveform.mean(1)
    if waveform.ndim != 2 or 0 in waveform.shape:
        raise ValueError(f"A waveform has shape (batch, samples), not {tuple(waveform.shape)}.")
    waveform = waveform.float()
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=waveform.device)
        if lengths.shape != waveform.shape[:1] or lengths.min() < 1 or lengths.max() > waveform.shape[1]:
            raise ValueError(
                f"lengths are {waveform.shape[0]} numbers from 1 to {waveform.shape[1]}, not {lengths.tolist()}."
            )
        waveform = silence_after(waveform, lengths)
    if not waveform.sum().isfinite():  # one pass, and anything that is no number spreads to the sum
        row, sample = (~waveform.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"Sample {sample} of waveform {row} is not a finite number.")
    if sampling_rate != own_rate:
        samples = -(-waveform.shape[1] * own_rate // sampling_rate)
        resampled = soxr.resample(waveform.T.cpu().numpy(), sampling_rate, own_rate, quality="HQ")
        resampled = np.pad(resampled, [(0, max(0, samples - len(resampled))), (0, 0)])[:samples]
        waveform = torch.from_numpy(np.ascontiguousarray(resampled.T)).to(waveform.device)
        if lengths is not None:  # what resampling makes of the end of a sound reaches beyond it
            lengths = -(-lengths * own_rate // int(sampling_rate))
            waveform = silence_after(waveform, lengths)
    return waveform, lengths


# Copied from tonefield.models.audio_tokenizer_mulaw.check_codes
def check_codes(codes: torch.Tensor, num_codebooks: int, codebook_size: int) -> None:
    """Refuses what no tokenizer of this shape can have written."""
    if codes.ndim != 3 or codes.shape[1] != num_codebooks or 0 in codes.shape:
        raise ValueError(f"Codes have shape (batch, {num_codebooks}, frames), not {tuple(codes.shape)}.")
    if codes.is_floating_point():
        raise ValueError(f"Codes are integers, not {codes.dtype}.")
    bad = (codes < 0) | (codes >= codebook_size)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(f"Codes lie in 0..{codebook_size - 1}; {codes[tuple(place)]} at {place} does not.")


# Copied from tonefield.models.codec_transformers.cross_fade
def cross_fade(pieces: list[torch.Tensor], overlap: int) -> torch.Tensor:
    """Joins sounds (batch, samples) of which each begins with the last `overlap` samples of the one before."""
    rise = (torch.arange(overlap, device=pieces[0].device) + 0.5) / max(1, overlap)
    joined = [pieces[0]]
    for piece in pieces[1:]:
        before = joined.pop()
        seam = before[:, before.shape[1] - overlap :] * (1 - rise) + piece[:, :overlap] * rise
        joined += [before[:, : before.shape[1] - overlap], torch.cat([seam, piece[:, overlap:]], dim=1)]
    return torch.cat(joined, dim=1)


# Copied from tonefield.models.codec_fsq.overlap_add
def overlap_add(frames: torch.Tensor, hop: int) -> torch.Tensor:
    """The sum of frames (batch, frames, size), each a hop after the other. (`fold` is slower, and wrong compiled.)"""
    # The frames are cut in pieces of one hop: piece j of frame i belongs to hop i + j.
    pieces = nn.functional.pad(frames, (0, -frames.shape[2] % hop)).unflatten(-1, (-1, hop))
    last = pieces.shape[2] - 1
    padded = [nn.functional.pad(pieces[:, :, j], (0, 0, j, last - j)) for j in range(last + 1)]
    return sum(padded).flatten(1)


def istft(spectra: torch.Tensor, n_fft: int, hop: int) -> torch.Tensor:
    """
    The signal (batch, frames * hop) of spectra (batch, frames, bins): windowed pieces, added up and divided by what
    their windows add up to (Griffin and Lim 1984, eq. 6). Half of what a window exceeds the hop by is cut at each end.
    """
    window = torch.hann_window(n_fft, device=spectra.device)
    count, margin = spectra.shape[1], (n_fft - hop) // 2
    inside = slice(margin, margin + count * hop)
    signal = overlap_add(torch.fft.irfft(spectra, n=n_fft) * window, hop)[:, inside]
    return signal / overlap_add(window.square().expand(1, count, -1), hop)[:, inside]


class MirroredConv(nn.Conv1d):
    """
    A convolution of EnCodec that is not causal: ceil(length / stride) frames, of sound that is mirrored at its ends.

    Each row of (batch, channels, length) has an end of its own, and what comes after it changes nothing.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1):
        super().__init__(inputs, outputs, kernel_size, stride)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and their lengths (batch,); also returns the lengths of what comes out."""
        (size,), (stride,) = self.kernel_size, self.stride
        after = (lengths + stride - 1) // stride
        if size == 1:
            return super().forward(x), after
        right = (size - stride) // 2
        left = size - stride - right
        # A row that is too short to be mirrored is continued by silence before it is.
        farthest = right + after * stride - lengths
        turn = (torch.maximum(lengths, farthest + 1) - 1)[:, None]
        place = torch.arange(-left, x.shape[-1] + right + stride - 1, device=x.device).abs()
        place = (turn - (turn - place).abs()).clamp(min=0)
        inside = place < lengths[:, None]
        place = place.clamp(max=x.shape[-1] - 1)
        x = x.gather(-1, place[:, None].expand(-1, x.shape[1], -1)) * inside[:, None]
        return super().forward(x), after


class EncoderBlock(nn.Module):
    """A residual unit of half the width, then frames fewer by the stride and twice as wide."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.narrow = MirroredConv(width, width // 2, 3)
        self.widen = MirroredConv(width // 2, width, 1)
        self.shortcut = MirroredConv(width, width, 1)
        self.down = MirroredConv(width, 2 * width, 2 * stride, stride)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner, _ = self.narrow(F.elu(x), lengths)
        x = self.shortcut(x, lengths)[0] + self.widen(F.elu(inner), lengths)[0]
        return self.down(F.elu(x), lengths)


class ResidualBlock(nn.Module):
    """Two convolutions along the frames, each after a normalisation over groups of channels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, width, eps=1e-6), nn.GroupNorm(32, width, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Attention(nn.Module):
    """Each frame attends to all others, in one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Conv1d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        q, k, v = (layer(hidden).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2))


class ConvNeXtBlock(nn.Module):
    """Each channel along the frames, then all channels of a frame (Liu et al. 2022)."""

    def __init__(self, width: int, inner_width: int):
        super().__init__()
        self.mix = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen, self.narrow = nn.Linear(width, inner_width), nn.Linear(inner_width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.mix(x).transpose(1, 2))
        return x + (self.scale * self.narrow(F.gelu(self.widen(hidden)))).transpose(1, 2)


class WavTokenizer(ModelMixin, ConfigMixin):
    r"""
    WavTokenizer (https://huggingface.co/papers/2408.16532): mono sound to one code per frame, and back.

    `python -m tonefield.conversion.wavtokenizer` makes one of published weights. Codes are those of the whole sound,
    however long it is and whatever else is in the batch: convolutions see windows with all that they reach, the
    recurrent layer runs through. The decoder attends to all frames, and has learnt from three seconds at a time, so
    that long sounds are decoded in windows that overlap.

    Args:
        sampling_rate (`int`, *optional*, defaults to 24000): Samples per second.
        strides (`tuple[int, ...]`, *optional*, defaults to `(2, 4, 5, 8)`):
            Of the encoder's blocks. A frame has as many samples as their product: 320 for 75 frames per second, 600,
            of `(4, 5, 5, 6)`, for 40.
        encoder_width (`int`, *optional*, defaults to 32): Channels of the encoder's first block, which each doubles.
        latent_dim (`int`, *optional*, defaults to 512): Length of a codebook's vector.
        codebook_size (`int`, *optional*, defaults to 4096): Number of codes.
        width, inner_width (`int`, *optional*, defaults to 768 and 2304): Channels of the decoder, and in its blocks.
        num_layers (`int`, *optional*, defaults to 12): The decoder's blocks.
        n_fft (`int`, *optional*, defaults to 1280): Length of the windows that the decoder adds up.
    """

    @register_to_config
    def __init__(
        self,
        sampling_rate: int = 24000,
        strides: tuple[int, ...] = (2, 4, 5, 8),
        encoder_width: int = 32,
        latent_dim: int = 512,
        codebook_size: int = 4096,
        width: int = 768,
        inner_width: int = 2304,
        num_layers: int = 12,
        n_fft: int = 1280,
    ):
        super().__init__()
        hop = math.prod(strides)
        if n_fft < 2 * hop or n_fft % 2 or hop % 2:
            raise ValueError(f"n_fft {n_fft} must be even and at least two hops long, and the hop of {hop} even too.")
        if width % 32:
            raise ValueError(f"width is a multiple of 32, not {width}.")
        widest = encoder_width * 2 ** len(strides)
        self.encoder_in = MirroredConv(1, encoder_width, 7)
        self.encoder = nn.ModuleList(EncoderBlock(encoder_width * 2**i, stride) for i, stride in enumerate(strides))
        self.encoder_lstm = nn.LSTM(widest, widest, num_layers=2, batch_first=True)
        self.encoder_out = MirroredConv(widest, latent_dim, 7)
        self.codebook = nn.Embedding(codebook_size, latent_dim)
        self.decoder_in = nn.Conv1d(latent_dim, width, 7, padding=3)
        self.position_net = nn.Sequential(
            ResidualBlock(width), ResidualBlock(width), Attention(width), ResidualBlock(width), ResidualBlock(width),
            nn.GroupNorm(32, width, eps=1e-6),
        )  # fmt: skip
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = nn.Sequential(*(ConvNeXtBlock(width, inner_width) for _ in range(num_layers)))
        self.decoder_out_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, n_fft + 2)

    @property
    def sampling_rate(self) -> int:
        return self.config.sampling_rate

    @property
    def hop_length(self) -> int:
        return math.prod(self.config.strides)

    @property
    def num_codebooks(self) -> int:
        return 1

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def window_frames(self) -> int:
        """Frames that are encoded or decoded at a time."""
        return WINDOW_SECONDS * self.sampling_rate // self.hop_length

    def num_frames(self, samples: int) -> int:
        """The frames of a number of samples at `sampling_rate`: the last one may be incomplete."""
        return -(-samples // self.hop_length)

    def fingerprint(self) -> str:
        """Tells tokenizers apart: equal when the same codes mean the same sound."""
        meaning = {name: value for name, value in sorted(self.config.items()) if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(meaning).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def embed(self, waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Samples (batch, samples) at `sampling_rate`, of so many in each row: vectors (batch, frames, latent_dim)."""
        hop, samples = self.hop_length, waveform.shape[1]
        # What a frame's convolutions before the recurrent layer reach on either side, in samples
        reach, spacing = 3, 1
        for stride in self.config.strides:
            reach += spacing * (1 + stride)
            spacing *= stride
        margin = self.num_frames(reach) * hop
        pieces = []
        for start in range(0, samples, self.window_frames * hop):
            first, end = max(0, start - margin), start + self.window_frames * hop
            x = waveform[:, None, first : end + margin]
            inside = (lengths - first).clamp(1, x.shape[-1])
            x, inside = self.encoder_in(x, inside)
            for block in self.encoder:
                x, inside = block(x, inside)
            pieces.append(x[..., (start - first) // hop : (end - first) // hop])
        x = torch.cat(pieces, dim=-1).transpose(1, 2)
        x = x + self.encoder_lstm(x)[0]
        x, _ = self.encoder_out(F.elu(x).transpose(1, 2), (lengths + hop - 1) // hop)
        return x.transpose(1, 2)

    @torch.no_grad()
    def encode(
        self, waveform: torch.Tensor, sampling_rate: int, lengths: torch.Tensor | list[int] | None = None
    ) -> torch.Tensor:
        """
        Args:
            waveform (`torch.Tensor` of shape `(batch, samples)` or `(batch, channels, samples)`): Samples in [-1, 1].
            sampling_rate (`int`): Their rate. They are resampled if it is not the tokenizer's.
            lengths (*optional*): The samples of each row. What comes after them changes no code of the row.

        Returns:
            `torch.Tensor` of shape `(batch, 1, num_frames(samples))`, int64; 0 after the end of a row.
        """
        waveform, lengths = prepare_waveform(waveform, sampling_rate, self.sampling_rate, lengths)
        waveform = waveform.to(self.device, self.dtype)
        if lengths is None:
            lengths = torch.full(waveform.shape[:1], waveform.shape[1])
        lengths = lengths.to(self.device)
        codebook = self.codebook.weight.float()
        # The nearest vector e of x: |x - e|^2 = |x|^2 - 2 x e + |e|^2
        half_norms = codebook.square().sum(1) / 2
        pieces = self.embed(waveform, lengths).float().split(self.window_frames, dim=1)
        codes = torch.cat([(x @ codebook.T - half_norms).argmax(-1) for x in pieces], dim=1)
        frames = torch.arange(codes.shape[1], device=self.device)
        return codes.masked_fill(frames * self.hop_length >= lengths[:, None], 0)[:, None]

    @torch.no_grad()
    def decode(
        self,
        codes: torch.Tensor,
        chunk_frames: int | None = None,
        overlap_frames: int | None = None,
        lengths: torch.Tensor | list[int] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            codes (`torch.Tensor` of shape `(batch, 1, frames)`): What `encode` returns.
            chunk_frames (`int`, *optional*): Decode so many frames at a time; those of twenty seconds by default.
            overlap_frames (`int`, *optional*): Frames that two chunks share and cross-fade; an eighth by default.
            lengths (*optional*): The frames of each row, if there are rows that are padded: silence comes after them.

        Returns:
            `torch.Tensor` of shape `(batch, frames * hop_length)`, float32.
        """
        check_codes(codes, 1, self.codebook_size)
        codes, frames = codes[:, 0].to(self.device), codes.shape[2]
        chunk = self.window_frames if chunk_frames is None else chunk_frames
        overlap = chunk // 8 if overlap_frames is None else overlap_frames
        if chunk < 1 or not 0 <= overlap <= chunk // 2:
            raise ValueError(
                f"chunk_frames is at least 1 and overlap_frames at most half of it, not {chunk} and {overlap}."
            )
        if lengths is not None:
            lengths = torch.as_tensor(lengths)
            if lengths.shape != codes.shape[:1] or lengths.min() < 1 or lengths.max() > frames:
                raise ValueError(f"lengths are {len(codes)} numbers from 1 to {frames}, not {lengths.tolist()}.")
            sound = torch.zeros(len(codes), frames * self.hop_length, device=self.device)
            for count in lengths.unique().tolist():  # attention and normalisation see all frames of a row
                rows = (lengths == count).to(self.device)
                sound[rows, : count * self.hop_length] = self.decode(codes[rows, None, :count], chunk, overlap)
            return sound
        starts = range(0, max(1, frames - overlap), chunk - overlap)
        pieces = [self._decode(codes[:, start : start + chunk]) for start in starts]
        return cross_fade(pieces, overlap * self.hop_length)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        x = self.position_net(self.decoder_in(self.codebook(codes).transpose(1, 2)))
        x = self.decoder(self.decoder_norm(x.transpose(1, 2)).transpose(1, 2))
        x = self.head(self.decoder_out_norm(x.transpose(1, 2))).float()
        log_magnitude, phase = x.chunk(2, dim=-1)
        return istft(torch.polar(log_magnitude.exp().clamp(max=100), phase), self.config.n_fft, self.hop_length)
