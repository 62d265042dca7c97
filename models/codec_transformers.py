"""Codecs of transformers (EnCodec, DAC, Mimi) behind one interface, in spite of their differences."""

import hashlib
import json
from numbers import Integral
from typing import Any

import numpy as np
import soxr
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from transformers import AutoConfig, AutoModel


KINDS = ("encodec", "dac", "mimi")


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


def cross_fade(pieces: list[torch.Tensor], overlap: int) -> torch.Tensor:
    """Joins sounds (batch, samples) of which each begins with the last `overlap` samples of the one before."""
    rise = (torch.arange(overlap, device=pieces[0].device) + 0.5) / max(1, overlap)
    joined = [pieces[0]]
    for piece in pieces[1:]:
        before = joined.pop()
        seam = before[:, before.shape[1] - overlap :] * (1 - rise) + piece[:, :overlap] * rise
        joined += [before[:, : before.shape[1] - overlap], torch.cat([seam, piece[:, overlap:]], dim=1)]
    return torch.cat(joined, dim=1)


class TransformersCodec(ModelMixin, ConfigMixin):
    r"""
    EnCodec, DAC or Mimi of transformers as an audio tokenizer: mono sound to codes (batch, codebooks, frames), and
    back.

    Silence completes a sound to whole frames, and sounds of different numbers of frames are encoded apart: the codes
    of a sound do not depend on what else is in the batch. `from_transformers` loads a codec by its name on the Hub,
    `save_pretrained` and `from_pretrained` keep it as part of a pipeline.

    Args:
        codec_config (`dict`): The configuration of the model in transformers, with its `model_type`.
        num_codebooks (`int`, *optional*):
            How many codebooks to use: residual codecs refine with each one. By default as many as the codec itself.
    """

    codec: Any  # of a class of transformers

    @register_to_config
    def __init__(self, codec_config: dict, num_codebooks: int | None = None):
        super().__init__()
        if codec_config.get("model_type") not in KINDS:
            raise ValueError(
                f"{codec_config.get('model_type')!r} is no codec that is known here: those are {', '.join(KINDS)}."
            )
        self.codec = AutoModel.from_config(AutoConfig.for_model(**codec_config)).eval()
        c = self.codec.config
        if c.model_type == "encodec" and (c.normalize or c.audio_channels != 1 or c.chunk_length_s is not None):
            raise ValueError(
                "This EnCodec is stereo or scales its input by numbers that are not in the codes: use a mono one that"
                " does not, such as facebook/encodec_24khz."
            )
        most, usual = {
            "encodec": lambda: (self.codec.quantizer.num_quantizers, self._encodec_codebooks(c.target_bandwidths[0])),
            "dac": lambda: (c.n_codebooks, c.n_codebooks),
            "mimi": lambda: (c.num_quantizers, c.num_quantizers),
        }[c.model_type]()
        if num_codebooks is not None and not 1 <= num_codebooks <= most:
            raise ValueError(f"num_codebooks is between 1 and {most} for this codec, not {num_codebooks}.")
        self.num_codebooks = num_codebooks or usual

    def _encodec_codebooks(self, bandwidth: float) -> int:
        return self.codec.quantizer.get_num_quantizers_for_bandwidth(bandwidth)

    @classmethod
    def from_transformers(
        cls, pretrained_model_name_or_path: str, num_codebooks: int | None = None, **kwargs
    ) -> "TransformersCodec":
        """The codec of a repository or folder that transformers wrote: `from_transformers("kyutai/mimi", 8)`."""
        kwargs = {"trust_remote_code": False} | kwargs  # otherwise transformers asks whether to run code it finds
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        with torch.device("meta"):  # what is refused is refused before the weights are read
            tokenizer = cls(config.to_diff_dict(), num_codebooks)
        tokenizer.codec = AutoModel.from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **kwargs)
        return tokenizer.eval()

    @property
    def sampling_rate(self) -> int:
        return self.codec.config.sampling_rate

    @property
    def hop_length(self) -> int:
        c = self.codec.config
        return c.frame_size if c.model_type == "mimi" else c.hop_length

    @property
    def codebook_size(self) -> int:
        return self.codec.config.codebook_size

    def num_frames(self, samples: int) -> int:
        """The frames of a number of samples at `sampling_rate`: the last one may be incomplete."""
        return -(-samples // self.hop_length)

    def fingerprint(self) -> str:
        """Tells tokenizers apart: equal when the same codes mean the same sound."""
        digest = hashlib.sha256(json.dumps([self.num_codebooks, self.config.codec_config["model_type"]]).encode())
        for name, value in sorted(self.codec.state_dict().items()):
            digest.update(name.encode() + value.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def encode(
        self, waveform: torch.Tensor, sampling_rate: int, lengths: torch.Tensor | list[int] | None = None
    ) -> torch.Tensor:
        """
        Args:
            waveform (`torch.Tensor` of shape `(batch, samples)` or `(batch, channels, samples)`): Samples in [-1, 1].
            sampling_rate (`int`): Their rate. They are resampled if it is not the codec's.
            lengths (*optional*): The samples of each row; what comes after them is taken for silence.

        Returns:
            `torch.Tensor` of shape `(batch, num_codebooks, num_frames(samples))`, int64; 0 after the end of a row.
        """
        waveform, lengths = prepare_waveform(waveform, sampling_rate, self.sampling_rate, lengths)
        batch, samples = waveform.shape
        frames = self.num_frames(samples)
        waveform = torch.nn.functional.pad(waveform, (0, frames * self.hop_length - samples)).to(
            self.device, self.dtype
        )
        if lengths is None:
            return self._encode(waveform)
        codes = torch.zeros(batch, self.num_codebooks, frames, dtype=torch.long, device=self.device)
        counts = -(-lengths.to(self.device) // self.hop_length)
        for count in counts.unique().tolist():
            rows = counts == count
            codes[rows, :, :count] = self._encode(waveform[rows, : count * self.hop_length])
        return codes

    def _encode(self, waveform: torch.Tensor) -> torch.Tensor:
        codec, kind, wanted = self.codec, self.codec.config.model_type, self.num_codebooks
        if kind == "encodec":
            # Codebooks refine one another, so the first ones of a higher bandwidth are those of a lower one.
            bandwidths = sorted(codec.config.target_bandwidths)
            enough = next((b for b in bandwidths if self._encodec_codebooks(b) >= wanted), bandwidths[-1])
            return codec.encode(waveform[:, None], bandwidth=enough).audio_codes[0][:, :wanted]
        if kind == "dac":
            return codec.encode(waveform[:, None], n_quantizers=wanted).audio_codes
        return codec.encode(waveform[:, None], num_quantizers=wanted).audio_codes

    @torch.no_grad()
    def decode(
        self, codes: torch.Tensor, chunk_frames: int | None = None, overlap_frames: int | None = None
    ) -> torch.Tensor:
        """
        Args:
            codes (`torch.Tensor` of shape `(batch, num_codebooks, frames)`): What `encode` returns.
            chunk_frames (`int`, *optional*): Decode so many frames at a time, for sounds that do not fit into memory.
            overlap_frames (`int`, *optional*): Frames that two chunks share and cross-fade; an eighth by default.

        Returns:
            `torch.Tensor` of shape `(batch, frames * hop_length)`, float32.
        """
        check_codes(codes, self.num_codebooks, self.codebook_size)
        codes, frames = codes.to(self.device), codes.shape[2]
        if chunk_frames is None or chunk_frames >= frames:
            return self._decode(codes)
        overlap = chunk_frames // 8 if overlap_frames is None else overlap_frames
        if not 0 <= overlap <= chunk_frames // 2:
            raise ValueError(f"overlap_frames is at most half of chunk_frames {chunk_frames}, not {overlap}.")
        step = chunk_frames - overlap
        starts = range(0, frames - overlap, step)
        pieces = [self._decode(codes[:, :, start : start + chunk_frames]) for start in starts]
        return cross_fade(pieces, overlap * self.hop_length)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        kind = self.codec.config.model_type
        if kind == "encodec":
            sound = self.codec.decode(codes[None], [None]).audio_values
        elif kind == "dac":
            sound = self.codec.decode(audio_codes=codes).audio_values
        else:
            sound = self.codec.decode(codes).audio_values
        sound = sound.reshape(len(codes), -1).float()
        samples = codes.shape[2] * self.hop_length
        return torch.nn.functional.pad(sound, (0, max(0, samples - sound.shape[1])))[:, :samples]
