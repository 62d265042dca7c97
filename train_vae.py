"""Trains an autoencoder that makes mel spectrograms small enough to be generated as latents.

    python train_vae.py --config recipes/fsdd-vae-cpu.yaml --dataset_name mels/digits --output_dir outputs/digits-vae
    python train_vae.py --dataset_name mels/songs --latent_dims 32,128 --cache_latents latents/songs
    accelerate launch --num_processes 8 train_vae.py --model_size large --dataset_name mels/songs
    python train_vae.py --dataset_name mels/digits --test

The autoencoder is diffusers' AutoencoderKL, on the mels of a dataset that audio_to_images.py made. It learns to give
back what it gets: by L1, by the modulation spectra of patches (how strong a texture is, wherever it lies), and from
--discriminator_start on by the judgement of a second network that learns to tell reconstructions from the data.

--output_dir receives `checkpoint-<step>` folders, `metrics.jsonl`, originals beside their reconstructions as pictures
and sounds in `samples`, the weights with the lowest validation loss in `best`, and at the end `vae` and `mel`, which
`AutoencoderKL.from_pretrained(DIR, subfolder="vae")` and `MelSpectrogram.from_pretrained(DIR, subfolder="mel")` load.
The mean and the spread of the latents are measured on the training set and stored as `shift_factor` and
`scaling_factor`: (latents - shift_factor) * scaling_factor has mean 0 and standard deviation 1.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tonefield.command_line import UserError, make_parser, parse, run
from tonefield.files import write_text, writing
from tonefield.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    prepare_output_dir,
)


# Autoencoders by name: channels before the first halving (doubled by the first two), residual blocks per level,
# groups of channels that are normalised together, channels of the discriminator.
MODEL_SIZES = {
    "tiny": dict(width=8, layers=1, groups=4, judge=8),
    "small": dict(width=32, layers=1, groups=8, judge=32),
    "medium": dict(width=64, layers=2, groups=32, judge=64),
    "large": dict(width=128, layers=2, groups=32, judge=64),
}  # fmt: skip


def height_and_width(text: str) -> tuple[int, int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers, default=0) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither H,W nor one number for both")
    return numbers[0], numbers[-1]


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_arguments(parser)

    model = parser.add_argument_group("autoencoder")
    model.add_argument(
        "--model_size",
        choices=MODEL_SIZES,
        default="medium",
        help="parameters with latents of a quarter of the mel: tiny 0.2, small 2.6, medium 13.4, large 53.3 million"
        " (default: %(default)s)",
    )
    model.add_argument(
        "--latent_dims",
        type=height_and_width,
        metavar="H,W",
        help="size of the latents: mel bands first, then frames; the mel is halved equally often along both (default:"
        " a quarter of the mel)",
    )
    model.add_argument("--latent_channels", type=int, default=8, metavar="N", help="(default: %(default)s)")

    loss = parser.add_argument_group(
        "what it learns",
        "The loss is L1 + spectral + KL, the last two times their weights, and the discriminator's judgement. There is"
        " no LPIPS: it compares photographs, by a network that would have to be downloaded.",
    )
    loss.add_argument(
        "--spectral_weight",
        type=float,
        default=1.0,
        metavar="W",
        help="of the difference of modulation spectra; 0: L1 alone (default: %(default)s)",
    )
    loss.add_argument(
        "--kl_weight",
        type=float,
        default=1e-6,
        metavar="W",
        help="of the KL divergence from N(0, 1) in nats, per value of the mel: more makes the latents smoother and"
        " the reconstruction worse (default: %(default)s)",
    )
    loss.add_argument(
        "--discriminator_weight",
        type=float,
        default=0.5,
        metavar="W",
        help="how hard the discriminator pulls at the last layer, relative to the reconstruction; 0: there is none"
        " (default: %(default)s)",
    )
    loss.add_argument(
        "--discriminator_start",
        type=int,
        default=20_000,
        metavar="N",
        help="optimizer steps that are done without it (default: %(default)s)",
    )
    loss.add_argument(
        "--discriminator_learning_rate",
        type=float,
        metavar="LR",
        help="its own, on the same schedule (default: that of the autoencoder)",
    )

    add_training_arguments(parser)
    parser.add_argument_group("latents").add_argument(
        "--cache_latents",
        metavar="DIR",
        help="afterwards write a dataset of the latents, which train_unet.py reads instead of the mels",
    )
    parser.set_defaults(
        learning_rate=1e-4, adam_beta1=0.5, adam_beta2=0.9, output_dir="outputs/vae",
        image_column=None, class_column="label", class_conditional=False,
    )  # fmt: skip
    args = parse(parser, argv)

    check_arguments(parser, args)
    if args.test:
        args.discriminator_start = min(args.discriminator_start, 2)
    for name, least in {"latent_channels": 1, "discriminator_start": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is at least {least}, not {getattr(args, name)}")
    for name in ("spectral_weight", "kl_weight", "discriminator_weight"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} is at least 0, not {getattr(args, name):g}")
    if args.discriminator_learning_rate is not None and not args.discriminator_learning_rate > 0:
        parser.error(f"--discriminator_learning_rate must be positive, not {args.discriminator_learning_rate:g}")
    if args.cache_latents and args.streaming:
        parser.error("--cache_latents wants the whole dataset, which --streaming does not have")
    return args


def count_halvings(args, height: int, width: int) -> int:
    """How often the mel is halved to give the latents that were asked for."""
    factors = [2**n for n in range(1, 11) if height % 2**n == 0 and width % 2**n == 0]
    size = f"{height} x {width} mels (bands x frames)"
    if not factors or min(height, width) < 8:
        raise UserError(
            f"{size} cannot be halved or are smaller than 8: make a dataset whose bands and frames are multiples of 4"
            " (audio_to_images.py --resolution)."
        )
    wanted = args.latent_dims or (height // 4, width // 4)
    for factor in factors:
        if wanted == (height // factor, width // factor):
            return factor.bit_length() - 1
    possible = "; ".join(f"{height // factor},{width // factor}" for factor in factors)
    flag = f"--latent_dims {wanted[0]},{wanted[1]}" if args.latent_dims else "The default of --latent_dims, a quarter,"
    raise UserError(
        f"{flag} cannot be had of {size}, which are halved equally often along both. Possible: {possible}."
    )


def make_vae(args, data):
    """The autoencoder for the data."""
    import torch

    from tonefield.training.autoencoder import TrainableVAE

    channels, height, width = data.sample_shape
    size, halvings = MODEL_SIZES[args.model_size], count_halvings(args, height, width)
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * (halvings + 1),
        "up_block_types": ("UpDecoderBlock2D",) * (halvings + 1),
        "block_out_channels": tuple(size["width"] * min(2**level, 4) for level in range(halvings + 1)),
        "layers_per_block": size["layers"],
        "norm_num_groups": size["groups"],
        "latent_channels": args.latent_channels,
        "sample_size": max(height, width),
        # Convolutions alone: what a place of the mel becomes does not depend on how long the mel is.
        "mid_block_add_attention": False,
    }
    torch.manual_seed(args.seed)
    vae = TrainableVAE(**config)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae


def make_discriminator(args, data):
    """The opponent of the autoencoder, if it is to have one."""
    from tonefield.models import PatchDiscriminator
    from tonefield.training.loop import Opponent

    if not args.discriminator_weight:
        return None
    channels, *size = data.sample_shape
    layers = min(3, min(size).bit_length() - 2)  # two patches are left along each axis at least
    network = PatchDiscriminator(channels, MODEL_SIZES[args.model_size]["judge"], layers)
    rate = args.discriminator_learning_rate or args.learning_rate
    return Opponent(network, args.discriminator_start, {"lr": rate}, "discriminator")


def make_loss(args, mel, accelerator):
    """`compute_loss` of the training loop."""
    import torch
    from torch.func import functional_call

    from tonefield.training import autoencoder
    from tonefield.training.loop import Loss

    decibels = autoencoder.decibels_per_unit(mel)

    def compute_loss(vae, batch, generators, discriminator=None):
        mels = batch["clean"]
        reconstruction, parameters = vae(mels, generators if vae.training else None)
        reconstruction = reconstruction.float()
        parts = {
            "l1": (reconstruction - mels).abs().mean(),
            "spectral": autoencoder.spectral_loss(reconstruction, mels),
            "kl": autoencoder.kl_divergence(parameters),
        }
        faithful = parts["l1"] + args.spectral_weight * parts["spectral"]
        total = faithful + args.kl_weight * parts["kl"] / mels[0].numel()
        if not vae.training:
            parts |= autoencoder.reconstruction_quality(reconstruction, mels, decibels)
        if discriminator is None:
            return Loss(total, parts)

        # What the autoencoder learns of it must not reach the discriminator's weights, nor the other way round.
        judge = accelerator.unwrap_model(discriminator)
        fixed = {name: weight.detach() for name, weight in judge.named_parameters()}
        adversarial = -functional_call(judge, fixed, (reconstruction,)).mean()
        weight = args.discriminator_weight * autoencoder.adaptive_weight(
            faithful,
            adversarial,
            accelerator.unwrap_model(vae).decoder.conv_out.weight,
            reduce=lambda gradient: accelerator.reduce(gradient, "mean"),
        )
        real, made = discriminator(torch.cat([mels, reconstruction.detach()])).chunk(2)
        learning = autoencoder.discriminator_loss(real, made)
        parts |= {"adversarial": adversarial, "adversarial_weight": weight, "discriminator_loss": learning}
        return Loss(total + weight * adversarial, parts, learning)

    return compute_loss


def finish(trained, latents: dict):
    """diffusers' own autoencoder with the trained weights and the scale of its latents."""
    from diffusers import AutoencoderKL

    from tonefield.training.publishing import settings_of

    scale = {"shift_factor": latents["mean"], "scaling_factor": 1 / latents["std"]}
    vae = AutoencoderKL(**settings_of(trained) | scale)
    vae.load_state_dict(trained.state_dict())
    return vae.to(trained.device).eval()


def write_vae_card(args, accelerator, folder: Path, vae, quality: dict, repository: str) -> None:
    """README.md, if nobody wrote one."""
    from tonefield.training.publishing import training_facts, write_card

    name = repository or folder.resolve().name
    titles = ["original", "reconstruction"] * args.num_validation_samples
    facts = training_facts("train_vae.py", args, parse_args(["--dataset_name=none"]), accelerator, titles)
    facts |= {f"held out: {key.replace('_db', '')}": f"{value:.2f} dB" for key, value in quality.items()}
    write_card(
        folder, name, "An `AutoencoderKL` of mel spectrograms, with the front end that makes them.",
        facts | {"parameters": f"{vae.num_parameters():,}"},
        "from diffusers import AutoencoderKL\nfrom tonefield import MelSpectrogram\n\n\n"
        f'vae = AutoencoderKL.from_pretrained("{name}", subfolder="vae")\n'
        f'mel = MelSpectrogram.from_pretrained("{name}", subfolder="mel")',
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    folder = prepare_output_dir(args.output_dir)

    import torch

    from tonefield.training.autoencoder import measure_reconstruction
    from tonefield.training.checkpoints import CONTINUE
    from tonefield.training.data import open_data
    from tonefield.training.latents import cache_latents, check_cache_folder, latent_shape, measure_latents
    from tonefield.training.loop import make_accelerator, train
    from tonefield.training.publishing import find_repository, publish_folder, settings_of
    from tonefield.training.validation import held_out_mels, show_mels, with_metrics

    if args.cache_latents:
        check_cache_folder(args)
    accelerator = make_accelerator(args)
    data = open_data(args)
    mel = data.mel
    if data.vae or mel is None:
        raise UserError(f"{args.dataset_name} holds latents: an autoencoder is trained on the mels they were made of.")
    vae = make_vae(args, data)
    opponent = make_discriminator(args, data)
    repository = find_repository(args) if args.push_to_hub and accelerator.is_main_process else ""
    compute_loss = make_loss(args, mel, accelerator)

    @torch.no_grad()
    def generate(network, step: int) -> None:
        if args.num_validation_samples:
            mels = next(data.validation_batches(args.num_validation_samples))["clean"]
            made = network(mels.to(accelerator.device))[0].cpu()
            pairs = torch.stack([mels, made], dim=1).flatten(0, 1)
            titles = ["original", "reconstruction"] * len(mels)
            show_mels(pairs, mel, folder / "samples", step, accelerator.trackers, titles)

    measured = with_metrics(args, accelerator, generate, lambda: held_out_mels(data, args.train_batch_size), every=2)
    shape = " x ".join(map(str, latent_shape(vae, mel)))
    sample = " x ".join(map(str, data.sample_shape))
    judge = f", discriminator {opponent.network.num_parameters():,}" if opponent else ""
    accelerator.print(f"{vae.num_parameters():,} parameters{judge}; {sample} mels, {shape} latents")
    if opponent and opponent.start >= args.max_train_steps:
        accelerator.print(f"the discriminator takes no part: it would after {opponent.start} steps")
    fixed = {
        "model size": args.model_size,
        "latent shape": shape,
        "discriminator": settings_of(opponent.network) if opponent else None,
        "network": settings_of(vae),
    }
    trained: Any = train(
        args, accelerator, vae, data, compute_loss, measured, fixed, "vae", opponent=opponent, keep_best=True
    )
    if accelerator.is_main_process:
        latents = measure_latents(trained, accelerator, data, args.train_batch_size)
        vae = finish(trained, latents)
        quality = measure_reconstruction(vae, mel, accelerator, data, args.train_batch_size)
        with writing(folder, CONTINUE):
            vae.save_pretrained(folder / "vae")
            mel.save_pretrained(folder / "mel")
            write_vae_card(args, accelerator, folder, vae, quality, repository)
        about = {"flags": vars(args), "latents": latents, "held_out": quality} | fixed
        write_text(folder / "training.json", json.dumps(about, indent=1, default=str))
        measured = "".join(f", {key.replace('_db', '')} {value:.2f} dB" for key, value in quality.items())
        print(f"the autoencoder is in {folder}{measured and ' (held out' + measured.replace(',', ':', 1) + ')'}")
        if args.cache_latents:
            cache_latents(args, accelerator, vae, mel, latents)
        if args.push_to_hub:
            publish_folder(folder, repository)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
