"""Published weights of WavTokenizer become an audio tokenizer, a WavTokenizer.

    python -m tonefield.conversion.wavtokenizer novateur/WavTokenizer-medium-music-audio-75token codecs/music
    python -m tonefield.conversion.wavtokenizer wavtokenizer_large_unify_600_24k.ckpt codecs/unify --license mit
    python audio_to_tokens.py --codec codecs/music --input_dir songs --output_dir tokens/songs

IN is a checkpoint (.ckpt), or a folder or Hub repository that holds one; --checkpoint says which if there are several.
Sizes and strides are read off its tensors. If a configuration is beside it, or is named by --model_config, it must say
the same, since the two are easily mixed up. Nothing of a checkpoint is executed.
"""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, first_line
from tonefield.conversion.command import find_source, importer_parser, load_strictly, read_checkpoint, run_importer
from tonefield.conversion.weight_norm import fold_weight_norm


if TYPE_CHECKING:
    import torch

    from tonefield.models import WavTokenizer

USED = ("feature_extractor.encodec.encoder.", "feature_extractor.encodec.quantizer.", "backbone.", "head.")

# What is among the used ones, but is no weight: the running sums of the codebook's training, and a window.
UNUSED = re.compile(r".*\._codebook\.(inited|cluster_size|embed_avg)|head\.istft\.window")

CODEBOOK = "feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"
ENCODER = "feature_extractor.encodec.encoder.model"
BANDWIDTHS = re.compile(r"backbone\.(convnext\.\d+\.)?norm\.(scale|shift)\.weight")


def published_names(model: "WavTokenizer") -> dict[str, str]:
    """The names of a model's tensors, and what they are in published weights."""
    blocks = len(model.encoder)
    # The beginnings of names. In the published list of the encoder's layers each block has a unit, an ELU, and a
    # convolution, so that block i stands at the places 3 i + 1 and 3 i + 3.
    beginnings = {
        "codebook.weight": CODEBOOK,
        "encoder_in.": f"{ENCODER}.0.conv.conv.",
        "encoder_lstm.": f"{ENCODER}.{3 * blocks + 1}.lstm.",
        "encoder_out.": f"{ENCODER}.{3 * blocks + 3}.conv.conv.",
        "decoder_in.": "backbone.embed.",
        "position_net.2.out.": "backbone.pos_net.2.proj_out.",
        "position_net.": "backbone.pos_net.",
        "decoder_norm.weight": "backbone.norm.scale.weight",
        "decoder_norm.bias": "backbone.norm.shift.weight",
        "decoder_out_norm.": "backbone.final_layer_norm.",
        "head.": "head.out.",
    }
    for i in range(blocks):
        for here, there in dict(narrow=".block.1", widen=".block.3", shortcut=".shortcut").items():
            beginnings[f"encoder.{i}.{here}."] = f"{ENCODER}.{3 * i + 1}{there}.conv.conv."
        beginnings[f"encoder.{i}.down."] = f"{ENCODER}.{3 * i + 3}.conv.conv."
    for i in range(len(model.decoder)):
        parts = {"mix.": "dwconv.", "norm.weight": "norm.scale.weight", "norm.bias": "norm.shift.weight"}
        parts |= {"widen.": "pwconv1.", "narrow.": "pwconv2.", "scale": "gamma"}
        beginnings |= {f"decoder.{i}.{here}": f"backbone.convnext.{i}.{there}" for here, there in parts.items()}
    names = {}
    for name in model.state_dict():
        here = next(beginning for beginning in beginnings if name.startswith(beginning))
        names[name] = beginnings[here] + name.removeprefix(here)
    return names


def sizes_of(weights: "Mapping[str, torch.Tensor]", file: str | os.PathLike) -> dict[str, Any]:
    """The arguments of `WavTokenizer` but for the rate, from the shapes of published tensors without weight norm."""
    lstms = [re.match(rf"{re.escape(ENCODER)}\.(\d+)\.lstm\.", name) for name in weights]
    place = next((int(match[1]) for match in lstms if match), None)

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim != dims:
            raise UserError(f"{file} does not hold a WavTokenizer: there is no {name} in it that could be one.")
        return tuple(weights[name].shape)

    if place is None or place % 3 != 1:
        raise UserError(f"{file} does not hold a WavTokenizer: there is no recurrent layer in {ENCODER}.")
    strides = [shape(f"{ENCODER}.{3 * i + 3}.conv.conv.weight", 3)[2] // 2 for i in range(place // 3)]
    layers = [re.match(r"backbone\.convnext\.(\d+)\.", name) for name in weights]
    codebook_size, latent_dim = shape(CODEBOOK, 2)
    return dict(
        strides=tuple(strides),
        encoder_width=shape(f"{ENCODER}.0.conv.conv.weight", 3)[0],
        latent_dim=latent_dim,
        codebook_size=codebook_size,
        width=shape("backbone.embed.weight", 3)[0],
        inner_width=shape("backbone.convnext.0.pwconv1.weight", 2)[0],
        num_layers=1 + max(int(match[1]) for match in layers if match),
        n_fft=shape("head.out.weight", 2)[0] - 2,
    )


def read_config(file: Path, sizes: Mapping[str, Any]) -> int:
    """The sampling rate that a published configuration says, which must be that of these sizes."""
    import yaml

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        arguments = config["model"]["init_args"]
        parts = {name: arguments[name]["init_args"] for name in ("feature_extractor", "backbone", "head")}
        rate = int(arguments["sample_rate"])
        told = dict(
            strides=tuple(reversed(parts["feature_extractor"]["dowmsamples"])),  # the published spelling
            codebook_size=parts["feature_extractor"]["vq_bins"],
            latent_dim=parts["backbone"]["input_channels"],
            width=parts["backbone"]["dim"],
            inner_width=parts["backbone"]["intermediate_dim"],
            num_layers=parts["backbone"]["num_layers"],
            n_fft=parts["head"]["n_fft"],
        )
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not YAML: {first_line(error)}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no configuration of WavTokenizer: {first_line(error)} is missing or wrong."
        ) from None
    for name, value in told.items():
        if value != sizes[name]:
            raise UserError(
                f"{file} is the configuration of another checkpoint: its {name} is {value}, that of the weights is"
                f" {sizes[name]}."
            )
    return rate


def find_files(
    source: str, checkpoint: str | None, model_config: str | os.PathLike | None
) -> tuple[Path, Path | None]:
    """The checkpoint, and the configuration if there is one."""
    path = find_source(source, [checkpoint or "*.ckpt", "*.yaml", "*.yml"])
    if path.is_dir():
        found = sorted(path.glob("*.ckpt")) if checkpoint is None else [path / checkpoint]
        if len(found) != 1:
            told = ", ".join(file.name for file in found) or "none"
            raise UserError(f"{source} must hold one checkpoint (*.ckpt), but has {told}: choose by --checkpoint.")
        configs = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        beside = configs[0] if len(configs) == 1 else None
        path = found[0]
    else:
        beside = None
    if model_config is not None and not Path(model_config).is_file():
        raise UserError(f"There is no file {model_config}, which --model_config names.")
    return path, beside if model_config is None else Path(model_config)


def convert_wavtokenizer(
    source: str | os.PathLike,
    checkpoint: str | None = None,
    model_config: str | os.PathLike | None = None,
    bandwidth_id: int = 0,
) -> "WavTokenizer":
    """
    The audio tokenizer of a published checkpoint.

    Args:
        source (`str` or `os.PathLike`): A checkpoint, or the folder or Hub id of one.
        checkpoint (`str`, *optional*): Which of several in a folder.
        model_config (`str` or `os.PathLike`, *optional*):
            The published configuration; by default one that lies in the folder. Without any the rate is 24 kHz.
        bandwidth_id (`int`, *optional*, defaults to 0):
            Which of the decoder's sets of norms to take. All are for the same bandwidth, and the original uses the
            first.
    """
    from tonefield.models import WavTokenizer

    file, config = find_files(os.fspath(source), checkpoint, model_config)
    read = read_checkpoint(file)
    weights = read.get("state_dict") if isinstance(read, Mapping) else None
    if not isinstance(weights, Mapping):
        raise UserError(f"{file} does not hold a WavTokenizer: there is no state_dict in it.")
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(USED) and not UNUSED.match(name)}
    weights = fold_weight_norm(weights)
    sizes = sizes_of(weights, file)
    rate = 24000 if config is None else read_config(config, sizes)
    for name in filter(BANDWIDTHS.fullmatch, weights):
        if not 0 <= bandwidth_id < len(weights[name]):
            raise UserError(f"--bandwidth_id is between 0 and {len(weights[name]) - 1}, not {bandwidth_id}.")
        weights[name] = weights[name][bandwidth_id]
    try:
        model = WavTokenizer(sampling_rate=rate, **sizes)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    names = published_names(model)
    own = {there: here for here, there in names.items()}
    weights = {own.get(name, name): tensor for name, tensor in weights.items()}
    load_strictly(model, weights, file, lambda name: names.get(name, name))
    return model.eval()


def convert(args: argparse.Namespace) -> "WavTokenizer":
    return convert_wavtokenizer(args.source, args.checkpoint, args.model_config, args.bandwidth_id)


def main(argv=None) -> None:
    parser = importer_parser(__doc__)
    parser.add_argument("--checkpoint", metavar="FILE.ckpt", help="which of several checkpoints in IN")
    parser.add_argument(
        "--model_config", metavar="FILE.yaml", help="the published configuration, to be checked against"
    )
    parser.add_argument(
        "--bandwidth_id", type=int, default=0, metavar="N",
        help="which of the decoder's sets of norms to take; the original uses the first (default: %(default)s)",
    )  # fmt: skip
    run_importer(convert, parser, argv)


if __name__ == "__main__":
    main()
