"""Networks of transformers that turn sounds into frames: EnCodec, and wav2vec 2.0 and its relatives."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import layer_norm
from transformers import AutoFeatureExtractor, AutoModel, EncodecModel, HubertConfig, HubertModel

from tonefield.command_line import UserError, first_line
from tonefield.evaluation.embeddings import Embedding, fingerprint_of


UNUSED = ("masked_spec_embed",)  # for training only; some published weights lack it


def load_pretrained(kind: Any, weights: str, **settings: Any) -> Any:
    """A model of transformers in float32, for inference. Weights that are not in its files are refused."""
    try:
        model, info = kind.from_pretrained(weights, dtype=torch.float32, output_loading_info=True, **settings)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{weights} cannot be loaded: {first_line(error)}") from None
    missing = sorted(key for key in info["missing_keys"] if not key.endswith(UNUSED))
    if missing or info["mismatched_keys"]:
        raise UserError(
            f"{weights} does not hold a {type(model).__name__}:"
            f" {(missing or [info['mismatched_keys'][0][0]])[0]} is not in it, or has another shape."
        )
    return model.eval()


def load_feature_extractor(weights: str) -> Any:
    try:
        return AutoFeatureExtractor.from_pretrained(weights, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{weights} has no settings of its input: {first_line(error)}") from None


class EncodecEmbedding(Embedding):
    """What EnCodec's encoder makes of a sound, before it is quantised: a row for each frame."""

    @classmethod
    def from_name(cls, weights: str | None, device: torch.device | str) -> "EncodecEmbedding":
        return cls(weights or "facebook/encodec_24khz", device)

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        self.model = load_pretrained(EncodecModel, weights).to(device)
        config = self.model.config
        self.name, self.dim, self.device = f"encodec={weights}", config.hidden_size, device
        self.sampling_rate = config.sampling_rate
        self.window, self.least = int((config.chunk_length_s or 30) * self.sampling_rate), self.sampling_rate // 10

    def fingerprint(self) -> str:
        return fingerprint_of(self.model.encoder, "encodec", 1, self.model.config.normalize)

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        config = self.model.config
        if config.normalize:
            pieces = pieces / (pieces.square().mean(-1, keepdim=True).sqrt() + 1e-8)
        return list(self.model.encoder(pieces[:, None].expand(-1, config.audio_channels, -1)).mT)


class SpeechEmbedding(Embedding):
    """
    A layer of wav2vec 2.0, HuBERT, WavLM, data2vec or MERT: a row for each frame.

    `weights` is the folder or Hub id, with `@N` for the output of layer N (0: what enters the first one) instead of
    the last.
    """

    @classmethod
    def from_name(cls, weights: str | None, device: torch.device | str) -> "SpeechEmbedding":
        if weights is None:
            raise UserError("The embedding encoder needs a model: --embeddings encoder=facebook/wav2vec2-base.")
        return cls(weights, device)

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        path, _, layer = weights.partition("@")
        extractor = load_feature_extractor(path)
        mert = self._mert_config(path)
        if mert is None:
            self.model = load_pretrained(AutoModel, path).to(device)
        else:
            self.model = load_pretrained(HubertModel, path, config=mert).to(device)
        config = self.model.config
        if not hasattr(config, "conv_stride"):
            raise UserError(f"{path} is a {config.model_type}, not a network of waveforms like wav2vec 2.0.")
        layers = config.num_hidden_layers
        if layer and not (layer.isdigit() and int(layer) <= layers):
            raise UserError(f"{path} has layers 0 to {layers}, not {layer}.")
        self.layer = int(layer) if layer else layers
        self.name, self.dim, self.device = f"encoder={weights}", config.hidden_size, device
        self.sampling_rate, self.normalize = extractor.sampling_rate, extractor.do_normalize
        self.window, self.least = 30 * self.sampling_rate, self.sampling_rate // 10

    @staticmethod
    def _mert_config(path: str) -> HubertConfig | None:
        """MERT is HuBERT at another sampling rate, under a name for which transformers would run code of its own."""
        file = Path(path, "config.json")
        if not file.is_file():
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(path, "config.json")
            if not isinstance(found, str):
                return None
            file = Path(found)
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("model_type") != "mert_model":
            return None
        if settings.get("feature_extractor_cqt"):
            raise UserError(f"{path} is a MERT with a constant-Q transform, which is not known here.")
        return HubertConfig(**{k: v for k, v in settings.items() if k not in ("model_type", "auto_map")})

    def fingerprint(self) -> str:
        return fingerprint_of(self.model, "speech", 1, self.layer, self.normalize, self.model.config.hidden_act)

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        if self.normalize:
            pieces = layer_norm(pieces, pieces.shape[-1:], eps=1e-7)
        if self.layer == self.model.config.num_hidden_layers:
            return list(self.model(pieces).last_hidden_state)
        return list(self.model(pieces, output_hidden_states=True).hidden_states[self.layer])
