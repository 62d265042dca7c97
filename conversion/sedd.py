"""Checkpoints of score-entropy discrete diffusion (SEDD) become a SEDDTokenPipeline.

    python -m tonefield.conversion.sedd louaaron/sedd-small models/sedd-small
    python -m tonefield.conversion.sedd exp_local/music/2024.05.01/120000 models/music --audio_tokenizer models/codec
    python -m tonefield.conversion.sedd runs/music/checkpoints/checkpoint_12.pth models/music

IN is a repository on the Hub or its folder (config.json, model.safetensors), the folder of a training run
(.hydra/config.yaml, checkpoints-meta/checkpoint.pth), or a checkpoint in one of them. Of a run the averaged weights
are taken unless --weights model asks for the others. Nothing of a checkpoint is executed.

With --audio_tokenizer, the codec that the training data was encoded with, the pipeline makes sound. Without, it makes
tokens, such as those of GPT-2 for the models of text:

    pipe = tonefield.load("models/sedd-small")
    tokens = pipe(num_frames=128, output_type="pt").tokens[:, 0]

It samples as the original does, with as many network calls as steps. For the absorbing graph another predictor is
exact, and needs no more calls than there are tokens:

    pipe.scheduler = ScoreEntropyScheduler.from_config(pipe.scheduler.config, predictor="event")
"""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, first_line
from tonefield.conversion.command import find_source, importer_parser, load_strictly, read_checkpoint, run_importer


if TYPE_CHECKING:
    import torch

    from tonefield.models import SEDDTransformer1DModel
    from tonefield.pipelines import SEDDTokenPipeline

# Where configuration and weights are: in a training run, and as published.
LAYOUTS = (
    (".hydra/config.yaml", "checkpoints-meta/checkpoint.pth"),
    ("config.json", "model.safetensors"),
    ("config.json", "pytorch_model.bin"),
)

# What the configuration must say.
FIELDS = {
    "tokens": int, "graph.type": str, "noise.type": str, "noise.sigma_min": float, "noise.sigma_max": float,
    "model.hidden_size": int, "model.cond_dim": int, "model.length": int, "model.n_blocks": int, "model.n_heads": int,
    "model.scale_by_sigma": bool, "model.dropout": float,
}  # fmt: skip

# What tensors are called, there and here.
NAMES = {
    "vocab_embed.embedding": "token_embedding.weight", "sigma_map.mlp": "noise_embedding", "attn_qkv": "qkv",
    "attn_out": "attention_out", "output_layer.norm_final": "norm_out", "output_layer.linear": "head",
    "output_layer.adaLN_modulation": "modulation_out", "adaLN_modulation": "modulation",
}  # fmt: skip
ANGLES = "rotary_emb.inv_freq"  # a table, which is no weight


def find_run(source: str, run_config: str | os.PathLike | None) -> tuple[Path, Path]:
    """The files of the configuration and of the weights."""
    path = find_source(source, [file for layout in LAYOUTS for file in layout])
    if path.is_dir():
        found = [(path / config, path / weights) for config, weights in LAYOUTS if (path / weights).is_file()]
        if not found:
            told = " or ".join(weights for _, weights in LAYOUTS)
            raise UserError(f"{source} holds no {told}: name the checkpoint itself if it is called otherwise.")
        config, weights = found[0]
    else:
        places = [path.parent / "config.json", *(folder / ".hydra" / "config.yaml" for folder in path.parents[:2])]
        config, weights = next((place for place in places if place.is_file()), places[-1]), path
    config = Path(run_config or config)
    if not config.is_file():
        raise UserError(
            f"There is no {config}, which would tell what network {weights} holds: name it by --run_config."
        )
    return config, weights


def read_config(file: Path) -> dict[str, Any]:
    """The `FIELDS` of a configuration, which is YAML or JSON."""
    import yaml

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not YAML: {first_line(error)}") from None
    fields = {}
    for name, kind in FIELDS.items():
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise UserError(f"{file} does not say {name}: it is no configuration of SEDD.")
        try:
            fields[name] = kind(value)
        except (TypeError, ValueError):
            raise UserError(f"{file}: {name} is {value!r}, which is no {kind.__name__}.") from None
    return fields


def choose_weights(checkpoint: Any, choice: str | None, file: Path) -> "tuple[dict[str, torch.Tensor], dict]":
    """The tensors of a checkpoint by name, and what the card says of them."""
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{file} holds no weights by name.")
    if "model" not in checkpoint:
        if choice is not None:
            raise UserError(f"{file} holds one set of weights, with no --weights to choose from: leave it out.")
        return dict(checkpoint), {}
    facts = {"training steps": checkpoint.get("step"), "weights": choice or "ema"}
    weights = dict(checkpoint["model"])
    if facts["weights"] == "ema":
        averages = (checkpoint.get("ema") or {}).get("shadow_params")
        if averages is None:
            raise UserError(f"{file} holds no averaged weights: --weights model takes the others.")
        names = [name for name in weights if name != ANGLES]  # in the order of the parameters
        if len(averages) != len(names):
            raise UserError(f"{file} holds {len(averages)} averaged weights for {len(names)} parameters.")
        weights = dict(zip(names, averages, strict=True))
    return weights, facts


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A name with the first of some parts that it has replaced."""
    return next((name.replace(old, new) for old, new in names.items() if old in name), name)


def with_one_more_token(transformer: "SEDDTransformer1DModel") -> "SEDDTransformer1DModel":
    """
    A network that took the last code of its codec for the mask, with that code.

    It looks like the mask, as it did to the network, and is never made. The score is e^f / (E N) with one N more.
    """
    import torch

    from tonefield.models.transformer_sedd import ILLEGAL

    n, weights = transformer.config.vocab_size, transformer.state_dict()
    embedding, head, bias = (weights[name] for name in ("token_embedding.weight", "head.weight", "head.bias"))
    bias = bias + math.log((n + 1) / n)
    weights["token_embedding.weight"] = torch.cat([embedding, embedding[n:]])
    weights["head.weight"] = torch.cat([head[:n], torch.zeros_like(head[:1]), head[n:]])
    weights["head.bias"] = torch.cat([bias[:n], bias.new_tensor([ILLEGAL]), bias[n:]])
    wider: Any = type(transformer).from_config(transformer.config, vocab_size=n + 1)
    wider.load_state_dict(weights)
    return wider


def convert_sedd(
    source: str | os.PathLike,
    audio_tokenizer: str | os.PathLike | None = None,
    weights: str | None = None,
    run_config: str | os.PathLike | None = None,
) -> "SEDDTokenPipeline":
    """
    A pipeline of a published SEDD, with the scores of the original.

    Args:
        source (`str` or `os.PathLike`): Hub id, folder or checkpoint.
        audio_tokenizer (`str` or `os.PathLike`, *optional*):
            What [`load_audio_tokenizer`] loads. If it has one code more than the network has tokens, the network took
            its last code for the mask: that code is never made then.
        weights (`"ema"` or `"model"`, *optional*): Of a training run: the averaged weights (default) or the others.
        run_config (`str` or `os.PathLike`, *optional*): The configuration, where it is not beside the weights.
    """
    from tonefield.models import SEDDTransformer1DModel, load_audio_tokenizer
    from tonefield.pipelines import SEDDTokenPipeline
    from tonefield.schedulers import ScoreEntropyScheduler

    config_file, file = find_run(os.fspath(source), run_config)
    c = read_config(config_file)
    absorbing = c["graph.type"] == "absorb"
    if c["model.scale_by_sigma"] and not absorbing:
        raise UserError(f"{config_file}: model.scale_by_sigma is for the graph absorb, not for {c['graph.type']}.")
    codec = None
    try:
        if audio_tokenizer is not None:
            codec = load_audio_tokenizer(audio_tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"--audio_tokenizer {audio_tokenizer} cannot be loaded: {first_line(error)}") from None
    tensors, facts = choose_weights(read_checkpoint(file), weights, file)
    try:
        transformer = SEDDTransformer1DModel(
            vocab_size=c["tokens"], graph_type=c["graph.type"], hidden_size=c["model.hidden_size"],
            num_layers=c["model.n_blocks"], num_heads=c["model.n_heads"], cond_dim=c["model.cond_dim"],
            dropout=c["model.dropout"], time_conditioning=True, max_length=c["model.length"],
            scaled_by_sigma=c["model.scale_by_sigma"] or not absorbing,
        )  # fmt: skip
        published = {here: there for there, here in NAMES.items()}
        load_strictly(
            transformer,
            {renamed(name, NAMES): tensor for name, tensor in tensors.items() if name != ANGLES},
            file,
            lambda name: renamed(name, published),
        )
        if codec is not None and absorbing and codec.codebook_size == c["tokens"] + 1:
            transformer = with_one_more_token(transformer)
        scheduler = ScoreEntropyScheduler(
            transformer.config.vocab_size, c["graph.type"], c["noise.type"], c["noise.sigma_min"],
            c["noise.sigma_max"], parameterization="score", predictor="analytic",
        )  # fmt: skip
        kind = "tokens" if codec is None else "sound"
        card = {"description": f"Score-entropy diffusion on {c['tokens']} tokens; it generates {kind}.", **facts}
        return SEDDTokenPipeline(transformer.eval(), scheduler, codec, card=card)
    except ValueError as error:
        raise UserError(f"{config_file}: {error}") from None


def convert(args: argparse.Namespace) -> "SEDDTokenPipeline":
    return convert_sedd(args.source, args.audio_tokenizer, args.weights, args.run_config)


def main(argv=None) -> None:
    parser = importer_parser(__doc__)
    parser.add_argument("--audio_tokenizer", metavar="NAME", help="the codec: mulaw, or a folder or Hub id of one")
    parser.add_argument(
        "--weights", choices=("ema", "model"), help="of a training run: the averaged ones (default) or the others"
    )
    parser.add_argument("--run_config", metavar="FILE", help="the configuration, where it is not beside the weights")
    run_importer(convert, parser, argv)


if __name__ == "__main__":
    main()
