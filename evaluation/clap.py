"""CLAP (Wu et al. 2023): one space for sounds and texts, from transformers or from LAION's own checkpoints."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import AutoTokenizer, ClapConfig, ClapFeatureExtractor, ClapModel

from tonefield.command_line import UserError, first_line
from tonefield.conversion.command import load_strictly, read_checkpoint
from tonefield.evaluation.embeddings import Embedding, fingerprint_of
from tonefield.evaluation.encoders import load_feature_extractor, load_pretrained


TEXT_TOKENIZER = "roberta-base"  # of LAION's checkpoints, which come without one


class ClapEmbedding(Embedding):
    """
    512 numbers of length 1 for each 10 s.

    Longer sounds are cut into windows of 10 s, whereas the feature extractor would draw one by chance; shorter ones
    are repeated, as in training.
    """

    mixed_lengths = True

    @classmethod
    def from_name(cls, weights: str | None, device: torch.device | str) -> "ClapEmbedding":
        return cls(weights or "laion/clap-htsat-unfused", device)

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        if Path(weights).is_file():
            self.model, self.extractor = load_laion(weights), ClapFeatureExtractor(
                truncation="rand_trunc", frequency_min=50
            )  # fmt: skip
            self.tokenizer_name = TEXT_TOKENIZER
        else:
            self.extractor = load_feature_extractor(weights)
            self.model = load_pretrained(ClapModel, weights)
            self.tokenizer_name = weights
        self.model.to(torch.device(device))  # pyright: ignore
        e: Any = self.extractor
        self.name, self.dim, self.device = f"clap={weights}", self.model.config.projection_dim, device
        self.sampling_rate, self.window, self.least = e.sampling_rate, e.nb_max_samples, e.sampling_rate // 10
        config: Any = self.model.config
        fused = config.audio_config.enable_fusion
        filters = e.mel_filters if fused else e.mel_filters_slaney
        self.filters = torch.from_numpy(np.asarray(filters)).float().to(device)
        self.channels = 4 if fused else 1

    def fingerprint(self) -> str:
        e = self.extractor
        settings = [e.padding, e.hop_length, e.fft_window_size, e.frequency_min, e.frequency_max, self.channels]
        return fingerprint_of(self.model.audio_model, "clap", 1, *settings)

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        features = self.log_mel(self.complete(pieces, lengths))[:, None].expand(-1, self.channels, -1, -1)
        longer = torch.zeros(len(pieces), 1, dtype=torch.bool, device=pieces.device)
        found: Any = self.model.get_audio_features(features, is_longer=longer)
        return list(found.pooler_output[:, None])

    def complete(self, pieces: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Pieces of full length: as many whole repetitions as fit, then silence ("repeatpad"), or what else is set."""
        assert self.window is not None
        places = torch.arange(self.window, device=pieces.device).expand(len(pieces), -1)
        lengths = lengths[:, None]
        ends = {"repeatpad": self.window // lengths * lengths, "repeat": self.window, "pad": lengths}
        return pieces.gather(1, places % lengths) * (places < ends[self.extractor.padding])

    def log_mel(self, sounds: torch.Tensor) -> torch.Tensor:
        """Decibels (batch, frames, bands), what the feature extractor computes of one sound after the other."""
        e = self.extractor
        half = e.fft_window_size // 2
        frames = pad(sounds[:, None], (half, half), mode="reflect")[:, 0].unfold(-1, e.fft_window_size, e.hop_length)
        spectra = torch.fft.rfft(frames * torch.hann_window(e.fft_window_size, device=sounds.device))
        power = spectra.real.square() + spectra.imag.square()
        return 10 * (power @ self.filters).clamp(min=1e-10).log10()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Rows (n, dim) of length 1."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"The tokenizer of {self.tokenizer_name} cannot be had: {first_line(error)}") from None
        # Without its files a tokenizer may know nothing but its special tokens, and make all texts the same.
        if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
            raise UserError(f"The tokenizer of {self.tokenizer_name} knows no words: its files are missing.")
        rows, config = [], self.model.config
        longest = config.text_config.max_position_embeddings - 2  # pyright: ignore[reportOptionalMemberAccess]
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt",
                max_length=longest,
            ).to(self.device)  # fmt: skip
            features: Any = self.model.get_text_features(batch["input_ids"], batch["attention_mask"])
            rows.append(features.pooler_output.cpu())
        return torch.cat(rows).double().numpy()


# ----- LAION's checkpoints

# From the names of LAION's modules to those of transformers, in this order.
RENAMED = (
    (r"^module\.", ""),
    (r"^audio_branch\.", "audio_model.audio_encoder."),
    (r"^text_branch\.", "text_model."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.bn0\.", ".batch_norm."),
    (r"^(audio|text)_projection\.0\.", r"\1_projection.linear1."),
    (r"^(audio|text)_projection\.2\.", r"\1_projection.linear2."),
    (r"^logit_scale_a$", "logit_scale_a"),
)
DROPPED = re.compile(
    r"spectrogram_extractor|logmel_extractor|tscam_conv|\.head\.|attn_mask|position_ids|^(audio|text)_transform\."
)


def rename_laion(weights: dict[str, Any]) -> dict[str, Any]:
    """LAION's weights under the names of transformers; one matrix of query, key and value becomes three."""
    renamed = {}
    for name, tensor in weights.items():
        if DROPPED.search(name.removeprefix("module.")):
            continue
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        if ".self.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", part)] = third
        else:
            renamed[name] = tensor
    return renamed


def load_laion(file: str) -> ClapModel:
    """A model with the weights of one of LAION's checkpoints without fusion, of a size that follows from them."""
    checkpoint = read_checkpoint(Path(file))
    weights = rename_laion(dict(checkpoint.get("state_dict", checkpoint)))
    audio = "audio_model.audio_encoder."
    try:
        first = len(weights[f"{audio}patch_embed.proj.weight"])
        depths = []
        while f"{audio}layers.{len(depths)}.blocks.0.layernorm_before.weight" in weights:
            pattern = re.compile(rf"{re.escape(audio)}layers\.{len(depths)}\.blocks\.(\d+)\.")
            depths.append(1 + max(int(found[1]) for found in map(pattern.match, weights) if found))
        heads = [
            weights[f"{audio}layers.{i}.blocks.0.attention.self.relative_position_bias_table"].shape[1]
            for i in range(len(depths))
        ]
        words = weights["text_model.embeddings.word_embeddings.weight"].shape
        places = len(weights["text_model.embeddings.position_embeddings.weight"])
        layers = 1 + max(int(i) for name in weights for i in re.findall(r"^text_model\.encoder\.layer\.(\d+)\.", name))
        inner = len(weights["text_model.encoder.layer.0.intermediate.dense.weight"])
        shared = len(weights["audio_projection.linear1.weight"])
    except KeyError as error:
        raise UserError(
            f"{file} does not hold a CLAP of LAION with HTSAT and RoBERTa: {error.args[0]} is missing."
        ) from None
    config = ClapConfig(
        audio_config={
            "patch_embeds_hidden_size": first, "hidden_size": first * 2 ** (len(depths) - 1), "depths": depths,
            "num_attention_heads": heads, "projection_dim": shared, "enable_fusion": False,
        },
        text_config={
            "vocab_size": words[0], "hidden_size": words[1], "max_position_embeddings": places,
            "num_hidden_layers": layers, "num_attention_heads": max(1, words[1] // 64), "intermediate_size": inner,
            "projection_dim": shared, "type_vocab_size": 1,
        },
        projection_dim=shared,
    )  # fmt: skip
    model = ClapModel(config).eval()
    for name, tensor in model.state_dict().items():  # what follows from the sizes
        if name.endswith(("position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked")):
            weights.setdefault(name, tensor)
    load_strictly(model, weights, file)
    return model
