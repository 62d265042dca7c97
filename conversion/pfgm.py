"""PFGM checkpoints, of pictures and of mel spectrograms, become a MelPFGMPipeline with a PoissonFlowScheduler.

    python -m tonefield.conversion.pfgm checkpoint_500000.pth models/sc09-pfgm
    python -m tonefield.conversion.pfgm checkpoint.pth models/mine --config_name config.json

IN is a `checkpoint_*.pth`, or a folder or Hub repository with just one. Which published network it holds is seen from
its tensors; --config_name says so instead, or names the JSON of another configuration (`config.to_json()` of the
original). The averaged weights are taken unless --weights model asks for those in training. Networks of spectrograms
with 64 or 128 bands make sound, all others return pictures.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, first_line
from tonefield.conversion.command import find_source, importer_parser, load_strictly, read_checkpoint, run_importer


if TYPE_CHECKING:
    import torch

    from tonefield.pipelines import MelPFGMPipeline


# What the published configurations say: the network, then the noise levels and the data.
PICTURES = dict(channels=3, width=128, biggan=True, centered=True, z_min=1e-3, gamma=5.0, license="apache-2.0")
MELS = PICTURES | dict(channels=1, centered=False, z_exp=1.0, license=None)
DEEP = dict(multipliers=(1, 1, 2, 2, 4, 4))
CIFAR = dict(multipliers=(1, 2, 2, 2), size=32, attention=(1,), z_max=40.0, upper_norm=3000.0, z_exp=5.0)
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10_ddpmpp": PICTURES | CIFAR | dict(kind="ddpmpp", blocks=4),
    "cifar10_ddpmpp_deep": PICTURES | CIFAR | dict(kind="ddpmpp", blocks=8),
    "cifar10_ncsnpp": PICTURES | CIFAR | dict(kind="ncsnpp", blocks=4),
    "celeba64_ddpmpp": PICTURES | CIFAR
    | dict(kind="ddpmpp", blocks=4, size=64, attention=(2,), z_max=60.0, upper_norm=6000.0, z_exp=1.0),
    "bedroom_ddpmpp": PICTURES | DEEP
    | dict(kind="ddpmpp", blocks=2, size=256, attention=(4,), z_max=100.0, upper_norm=30000.0, z_exp=0.1),
    "128_deep": MELS | DEEP | dict(kind="ddpmpp", blocks=4, size=128, attention=(3,), z_max=45.0, upper_norm=5000.0),
    "64_deep": MELS | DEEP | dict(kind="ddpmpp", blocks=6, size=64, attention=(2,), z_max=22.0, upper_norm=1800.0),
    "128_tiny": MELS | dict(kind="ddpmpp", multipliers=(1, 2, 4), blocks=4, size=128, attention=(), biggan=False,
                            z_max=45.0, upper_norm=5000.0),
    "sd_128": MELS | dict(kind="transformer", multipliers=(1, 2, 2, 2), blocks=2, size=128, attention=(3,),
                          z_max=46.0, upper_norm=7400.0),
    "sd_64": MELS | dict(kind="transformer", multipliers=(1, 2, 2, 2), blocks=2, size=64, attention=(2,),
                         z_max=22.0, upper_norm=1800.0),
}  # fmt: skip

# What networks of spectrograms of 64 and 128 bands see, in [0, 1]: amplitudes in decibels, the loudest 1, 80 dB below
# it 0. (That of 128 bands was made with windows of 512 samples, for which one band is always empty.)
FRONT_END: dict[str, Any] = dict(
    sample_rate=16000, n_fft=1024, top_db=160, f_min=20, f_max=8000, ref="slice", mel_scale="htk", mean=-1, std=2
)
HOPS = {64: 256, 128: 128}


def read_configuration(name: str) -> dict[str, Any]:
    """The settings of a published configuration by name, or of the JSON that one was written to."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        config = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--config_name {name} is neither a file nor one of {', '.join(PRESETS)}.") from None
    except ValueError as error:
        raise UserError(f"--config_name {name} is not JSON: {first_line(error)}") from None
    try:
        model, data, sampling = config["model"], config["data"], config["sampling"]
        size = data["image_size"] if "image_size" in data else data["image_height"]
        settings: dict[str, Any] = dict(
            channels=data["num_channels"], size=size, centered=data["centered"], z_min=sampling["z_min"],
            z_max=sampling["z_max"], upper_norm=sampling["upper_norm"], z_exp=sampling["z_exp"],
            gamma=config["training"]["gamma"], license=None,
        )  # fmt: skip
        if model["name"] == "stablediff":
            return settings | dict(
                kind="transformer", width=model["channels"], multipliers=tuple(model["channel_multipliers"]),
                blocks=model["n_res_blocks"], attention=tuple(model["attention_levels"]),
            )  # fmt: skip
        levels = range(len(model["ch_mult"]))
        supported = {
            ("positional", False, "none"): "ddpmpp",
            ("fourier", True, "residual"): "ncsnpp",
        }
        form = model["embedding_type"], model.get("fir", False), model.get("progressive_input", "none")
        if form not in supported or model["name"] not in ("ncsnpp", "ncsnpp_audio"):
            raise UserError(
                f"--config_name {name} is of a network {model['name']} with embedding_type, fir and progressive_input"
                f" {form}: only {' and '.join(map(str, supported))} can be imported."
            )
        return settings | dict(
            kind=supported[form], width=model["nf"], multipliers=tuple(model["ch_mult"]),
            blocks=model["num_res_blocks"], biggan=model["resblock_type"] == "biggan",
            attention=tuple(level for level in levels if size >> level in model["attn_resolutions"]),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(
            f"--config_name {name} is no configuration of PFGM: {type(error).__name__} {first_line(error)}."
        ) from None


def network_for(settings: Mapping[str, Any]) -> "torch.nn.Module":
    """An empty network of the settings."""
    from tonefield.models import PFGMTransformerUNet2DModel, PFGMUNet2DModel, SongUNet2DModel

    widths = [settings["width"] * multiplier for multiplier in settings["multipliers"]]
    common: dict[str, Any] = dict(
        sample_size=settings["size"], in_channels=settings["channels"], out_channels=settings["channels"] + 1,
        block_out_channels=widths, layers_per_block=settings["blocks"],
    )  # fmt: skip
    if settings["kind"] == "ncsnpp":
        return SongUNet2DModel(
            form="ncsnpp", model_channels=settings["width"], attention_levels=settings["attention"], **common
        )
    here = [level in settings["attention"] for level in range(len(widths))]
    if settings["kind"] == "transformer":
        return PFGMTransformerUNet2DModel(
            time_embedding_dim=4 * settings["width"],
            down_block_types=["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in here],
            up_block_types=["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(here)],
            attention_head_dim=widths,  # the number of heads: each channel is one
            **common,
        )
    kind = "Resnet{}sampleBlock2D" if settings["biggan"] else "{}Block2D"
    return PFGMUNet2DModel(
        center_input_sample=not settings["centered"],
        down_block_types=["AttnDownBlock2D" if attends else kind.format("Down") for attends in here],
        up_block_types=["AttnUpBlock2D" if attends else kind.format("Up") for attends in reversed(here)],
        downsample_type="resnet" if settings["biggan"] else "conv",
        upsample_type="resnet" if settings["biggan"] else "conv",
        **common,
    )


def read_weights(file: str | os.PathLike, weights: str = "ema") -> dict[str, "torch.Tensor"]:
    """The tensors of a checkpoint by name: the averaged ones, which it holds as a list, or those in training."""
    import torch

    content = read_checkpoint(Path(file))
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in model.values()):
        raise UserError(f"{file} is no checkpoint of PFGM: there is no 'model' of tensors in it.")
    if weights == "model":
        return model
    ema = content.get("ema")
    if not isinstance(ema, dict) or not isinstance(ema.get("shadow_params"), list):
        raise UserError(f"{file} holds no averaged weights ('ema'): take those in training with --weights model.")
    # The average is of what is trained, in the order of the parameters: not of a table of noise levels, nor of the
    # frequencies of random features.
    trained = [name for name, tensor in model.items() if not (name.endswith("sigmas") or is_frequencies(name, tensor))]
    average = ema["shadow_params"]
    if [model[name].shape for name in trained] != [getattr(tensor, "shape", None) for tensor in average]:
        raise UserError(f"{file}: the {len(average)} averaged weights are not those of the {len(trained)} parameters.")
    return model | dict(zip(trained, average, strict=True))


def is_frequencies(name: str, tensor: "torch.Tensor") -> bool:
    return name.endswith("all_modules.0.W") and tensor.ndim == 1


def converted_for(unet: "torch.nn.Module", weights: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    from tonefield.conversion.pfgm_unet import convert_ncsnpp, convert_pfgm_unet
    from tonefield.models import SongUNet2DModel

    if isinstance(unet, SongUNet2DModel):
        return convert_ncsnpp(unet, weights)
    return convert_pfgm_unet(unet, weights)


def guess_configuration(weights: Mapping[str, "torch.Tensor"], file: str | os.PathLike) -> str:
    """The name of the one published configuration whose network has tensors of just these shapes."""
    import torch

    # Networks take seconds to build, so those of another kind are left out first.
    transformer = any("input_blocks." in name for name in weights)
    random_features = any(is_frequencies(name, tensor) for name, tensor in weights.items())
    kind = "transformer" if transformer else "ncsnpp" if random_features else "ddpmpp"
    inputs = {tensor.shape[1] for tensor in weights.values() if tensor.ndim == 4}
    fitting = []
    for name, settings in PRESETS.items():
        if settings["kind"] != kind or settings["channels"] not in inputs:
            continue
        with torch.device("meta"):
            unet = network_for(settings)
        try:
            found = converted_for(unet, weights)
        except (ValueError, RuntimeError, KeyError):
            continue
        if {key: tensor.shape for key, tensor in found.items()} == {k: t.shape for k, t in unet.state_dict().items()}:
            fitting.append(name)
    if len(fitting) != 1:
        raise UserError(
            f"{file} holds none of the published networks ({', '.join(PRESETS)}): pass the configuration that it was"
            " trained with, as JSON, with --config_name."
        )
    return fitting[0]


def convert_pfgm(file: str | os.PathLike, config_name: str | None = None, weights: str = "ema") -> "MelPFGMPipeline":
    """
    A pipeline of a checkpoint of PFGM, for pictures or for mel spectrograms.

    Args:
        file (`str` or `os.PathLike`): The checkpoint.
        config_name (`str`, *optional*):
            A published configuration (see `PRESETS`), or the JSON file of another. Without it, the published one that
            the tensors fit.
        weights (`"ema"` or `"model"`, *optional*, defaults to `"ema"`): The averaged weights, or those in training.
    """
    from scipy.special import betainc

    from tonefield.models import MelSpectrogram
    from tonefield.pipelines import MelPFGMPipeline
    from tonefield.schedulers import PoissonFlowScheduler

    tensors = read_weights(file, weights)
    name = guess_configuration(tensors, file) if config_name is None else config_name
    settings = read_configuration(name)
    try:
        unet = network_for(settings)
        state = converted_for(unet, tensors)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not hold the network of {name}: {first_line(error)}") from None
    load_strictly(unet, state, file)
    count, top = settings["channels"] * settings["size"] ** 2, settings["upper_norm"] / settings["z_max"]
    scheduler = PoissonFlowScheduler(
        aug_dim=1,
        sigma_min=settings["z_min"],
        sigma_max=settings["z_max"],
        sigma_schedule="exponential",
        prediction_type="field",
        solver_type="rk45",
        gamma=settings["gamma"],
        z_exp=settings["z_exp"],
        # The published samplers clip the norm of the noise at a value that about half of all draws exceed. Ours draws
        # from the law below that value.
        prior_radius_quantile=float(betainc(count / 2, 0.5, top**2 / (1 + top**2))),
    )
    hop, mel = HOPS.get(settings["size"]), None
    if settings["channels"] == 1 and hop is not None:
        mel = MelSpectrogram(hop_length=hop, n_mels=settings["size"], num_frames=settings["size"], **FRONT_END)
    label = Path(name).stem
    card = {
        "description": f"PFGM, imported from a published checkpoint of the configuration `{label}`.",
        "license": settings["license"], "num_inference_steps": 18, "network": label, "weights": weights,
    }  # fmt: skip
    unet.eval()
    return MelPFGMPipeline(unet, scheduler, mel, card=card)  # pyright: ignore


def find_checkpoint(name: str) -> Path:
    path = find_source(name, ("*.pth",))
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.pth"))
    if len(found) != 1:
        told = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{name} must hold one checkpoint (*.pth) to choose from, but has {told}.")
    return found[0]


def convert(args: argparse.Namespace) -> "MelPFGMPipeline":
    pipeline = convert_pfgm(find_checkpoint(args.source), args.config_name, args.weights)
    if args.config_name is None:
        print(f"the tensors are those of {pipeline.config.card['network']}")
    return pipeline


def main(argv=None) -> None:
    parser = importer_parser(__doc__)
    parser.add_argument(
        "--config_name",
        metavar="NAME",
        help=f"the configuration: {', '.join(PRESETS)}, or a JSON file (default: the one that the tensors fit)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="the averaged weights or those in training (default: %(default)s)",
    )
    run_importer(convert, parser, argv)


if __name__ == "__main__":
    main()
