"""Trains a U-Net to generate mel spectrograms (or pictures) by Poisson flow, diffusion or a score SDE.

    python train_unet.py --config recipes/fsdd-64-cpu.yaml --dataset_name mels/digits --output_dir outputs/digits
    accelerate launch --num_processes 8 train_unet.py --config recipes/fsdd-64-gpu.yaml --dataset_name mels/digits
    python train_unet.py --dataset_name mels/digits --test

The dataset is one that audio_to_images.py made; its front end, statistics and classes come from there. With
--image_column any dataset of pictures will do. --output_dir receives `checkpoint-<step>` folders, `metrics.jsonl`,
what the network generates in `samples`, and at the end the pipeline, with the averaged weights.
"""

import argparse
import json
import math
from argparse import BooleanOptionalAction
from pathlib import Path

from tonefield.command_line import UserError, first_line, make_parser, parse, run
from tonefield.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    prepare_output_dir,
)


# Networks by name; attention from the given level on. Sizes for a test, a laptop, a 24 GB card, and 8 GPUs.
MODEL_SIZES = {
    "tiny": dict(block_out_channels=(8, 16), layers=1, attention_from=1, head_dim=8, groups=4),
    "small": dict(block_out_channels=(16, 32, 64, 128), layers=1, attention_from=2, head_dim=32, groups=8),
    "medium": dict(block_out_channels=(64, 128, 256, 256), layers=2, attention_from=2, head_dim=64, groups=32),
    "large": dict(block_out_channels=(128, 256, 384, 512), layers=3, attention_from=2, head_dim=64, groups=32),
}  # fmt: skip

MAX_ATTENTION = 4096  # positions that attend to one another; the cost grows with their square

POISSON = ("pfgmpp", "stable_target", "field")
WITH_CHARGES = ("stable_target", "field")
OBJECTIVES = (*POISSON, "epsilon", "v_prediction", "ve", "vp", "subvp")


def augmented_dimensions(text: str) -> float:
    try:
        value = math.inf if text.lower() == "none" else float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is neither a number above 0 nor inf")
    return value


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    data = add_data_arguments(parser)
    data.add_argument("--image_column", metavar="NAME", help="train on the pictures of this column instead of mels")
    data.add_argument("--random_flip", action=BooleanOptionalAction, default=False, help="mirror half of the pictures")
    data.add_argument(
        "--dequantize",
        action=BooleanOptionalAction,
        default=False,
        help="add noise to pictures that fills the gaps between 256 values",
    )
    data.add_argument("--class_column", default="label", metavar="NAME", help="the classes (default: %(default)s)")
    data.add_argument(
        "--class_conditional",
        action=BooleanOptionalAction,
        default=None,
        help="tell the network the class (default: if the dataset has at least two)",
    )
    data.add_argument(
        "--label_dropout",
        type=float,
        default=0.1,
        metavar="P",
        help="how often the class is withheld, for classifier-free guidance (default: %(default)s)",
    )

    model = parser.add_argument_group("network and objective")
    model.add_argument("--model_size", choices=MODEL_SIZES, default="small", help="(default: %(default)s)")
    model.add_argument("--model_config", metavar="FILE", help="instead: the UNet2DModel's arguments, JSON or YAML")
    model.add_argument("--dropout", type=float, default=0.0, metavar="P", help="(default: %(default)s)")
    model.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="pfgmpp",
        help="PFGM++ for any D (default), with stable targets, PFGM's field; DDPM; score SDEs",
    )
    model.add_argument(
        "--aug_dim",
        type=augmented_dimensions,
        metavar="D",
        help="augmented dimensions (default: 128, and 1 for field); inf is EDM diffusion",
    )
    model.add_argument(
        "--field_batch_size",
        type=int,
        metavar="K",
        help="charges of stable_target and field, over all processes (default: the batches alone)",
    )
    model.add_argument("--sigma_min", type=float, help="smallest noise level (default: the scheduler's)")
    model.add_argument("--sigma_max", type=float, help="largest one (default: the scheduler's; field: from the data)")
    model.add_argument("--p_mean", type=float, help="mean of ln(sigma) in training (default: -1.2; field: mid-range)")
    model.add_argument("--p_std", type=float, help="its deviation (default: 1.2; field: as wide as the range)")
    model.add_argument(
        "--num_inference_steps",
        type=int,
        metavar="N",
        help="steps of validation samples (default: 18; DDPM 50; score SDEs 200)",
    )
    add_training_arguments(parser)
    args = parse(parser, argv)

    check_arguments(parser, args)
    for name in ("label_dropout", "dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} lies between 0 and 1, not at {getattr(args, name):g}")
    if args.objective not in POISSON and args.aug_dim is not None:
        parser.error(f"--aug_dim has no meaning with --objective {args.objective}")
    if args.objective not in WITH_CHARGES and args.field_batch_size is not None:
        parser.error(f"--field_batch_size has no meaning with --objective {args.objective}")
    if args.objective == "field" and args.aug_dim == math.inf:
        parser.error("--objective field needs a finite --aug_dim")
    if args.mixed_precision == "fp16" and args.objective in POISSON and noise_dimensions(args) < 2:
        # |noise| exceeds 10^4 once in 10^4 samples at D = 1, once in 10^8 at D = 2; a float16 ends at 65504.
        parser.error("--mixed_precision fp16 cannot hold the noise of less than 2 augmented dimensions: use bf16")
    if args.objective in WITH_CHARGES and args.field_batch_size is not None and args.streaming:
        parser.error("--field_batch_size wants rows by number, which --streaming does not have")
    return args


def noise_dimensions(args) -> float:
    """D, which may be infinite."""
    return args.aug_dim or (1 if args.objective == "field" else 128)


def make_unet(args, data):
    """The network for the data: the flags' layout, one channel more for a field, one class more for "no class"."""
    import torch
    import yaml
    from diffusers import UNet2DModel

    channels, height, width = data.sample_shape
    derived = {
        "sample_size": [height, width],
        "in_channels": channels,
        "out_channels": channels + (args.objective == "field"),
        "num_class_embeds": len(data.class_names) + 1 if data.class_names else None,
    }
    if args.model_config:
        try:
            config = yaml.safe_load(Path(args.model_config).read_text())  # YAML contains JSON
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--model_config {args.model_config} cannot be read: {first_line(error)}") from None
        if not isinstance(config, dict):
            raise UserError(f"--model_config {args.model_config} must consist of the arguments of UNet2DModel.")
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        for name, meaning in {
            "num_class_embeds": "one for each class and one for none",
            "in_channels": "channels of the data",
            "out_channels": "channels of what the objective predicts",
        }.items():
            if config.get(name, derived[name]) != derived[name]:
                raise UserError(
                    f"--model_config has {name} {config[name]}, the dataset wants {derived[name]} ({meaning})."
                )
        config = config | derived
    else:
        size = MODEL_SIZES[args.model_size]
        positions = [(height >> level) * (width >> level) for level in range(len(size["block_out_channels"]))]
        attention = [
            level >= size["attention_from"] and count <= MAX_ATTENTION for level, count in enumerate(positions)
        ]
        config = derived | {
            "block_out_channels": size["block_out_channels"],
            "layers_per_block": size["layers"],
            "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
            "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
            "add_attention": attention[-1],
            "attention_head_dim": size["head_dim"],
            "norm_num_groups": size["groups"],
            "dropout": args.dropout,
        }
    levels = len(config.get("block_out_channels", (224, 448, 672, 896)))
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise UserError(
            f"{levels} levels halve the input {levels - 1} times, which {height} x {width} does not allow."
            f" Use a dataset with multiples of {factor} (audio_to_images.py --resolution), or fewer levels."
        )
    torch.manual_seed(args.seed)
    try:
        unet = UNet2DModel(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"UNet2DModel cannot be built: {first_line(error)}") from None
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def make_scheduler(args, data):
    """The scheduler of the objective; what depends on the data is computed from the data."""
    from diffusers import DDPMScheduler

    from tonefield.schedulers import PoissonFlowScheduler, ScoreSDEScheduler, pfgm_hyperparameters

    sigmas = {name: getattr(args, name) for name in ("sigma_min", "sigma_max") if getattr(args, name) is not None}
    law = {name: getattr(args, name) for name in ("p_mean", "p_std") if getattr(args, name) is not None}
    try:
        if args.objective in ("epsilon", "v_prediction"):
            return DDPMScheduler(prediction_type=args.objective, clip_sample=False)
        if args.objective not in POISSON:
            return ScoreSDEScheduler(args.objective, **sigmas)
        aug_dim = noise_dimensions(args)
        settings = {"aug_dim": None if aug_dim == math.inf else aug_dim, "sigma_data": data.sigma_data}
        if args.objective == "field":
            size = math.prod(data.sample_shape)
            _, z_max, _ = pfgm_hyperparameters(data.sigma_data * math.sqrt(size), size)
            low, high = 0.002, z_max / math.sqrt(aug_dim)
            low, high = sigmas.get("sigma_min", low), sigmas.get("sigma_max", high)
            # PFGM's noise levels are uniform in ln(sigma): the normal law of the same mean and deviation.
            settings |= {
                "prediction_type": "field",
                "sigma_min": low,
                "sigma_max": high,
                "p_mean": math.log(low * high) / 2,
                "p_std": math.log(high / low) / math.sqrt(12),
            }
        return PoissonFlowScheduler(**settings | sigmas | law)
    except ValueError as error:
        raise UserError(first_line(error).replace("`", "")) from None


def make_loss(args, scheduler, data, accelerator):
    """`compute_loss` of the training loop for the objective: told the class, and with charges where it has any."""
    import torch

    from tonefield.training import objectives
    from tonefield.training.randomness import uniform

    null_class = len(data.class_names)
    held_out_charges = []

    def told(labels, generators, dropout):
        """Labels as the network is told them: the last class is no class."""
        withheld = (labels < 0) | (uniform(len(labels), generators, labels.device) < dropout)
        return torch.where(withheld, null_class, labels)

    def charges_of(batch, training):
        """All processes' samples, and the further rows that `--field_batch_size` asks for, with their classes."""
        more = [batch["charges"]] if "charges" in batch else []
        labels = [batch["charge_labels"]] if "charge_labels" in batch else []
        if not training and data.train.extra:
            if not held_out_charges:
                held_out_charges.append(data.train.get(list(range(args.field_batch_size)), "charges"))
            fixed = held_out_charges[0]
            more = [fixed["clean"].to(batch["clean"].device)]
            labels = [fixed["class_labels"].to(batch["clean"].device)] if "class_labels" in fixed else []
        charges = torch.cat([batch["clean"], *more])
        classes = torch.cat([batch["class_labels"], *labels]) if "class_labels" in batch else None
        if training:  # in validation the processes' batches differ in number
            charges = accelerator.gather(charges)
            classes = None if classes is None else accelerator.gather(classes)
        return charges, classes

    def compute_loss(unet, batch, generators):
        clean, labels = batch["clean"], None
        if "class_labels" in batch:
            labels = told(batch["class_labels"], generators, args.label_dropout if unet.training else 0.0)

        def network(x, timestep):
            return unet(x, timestep, **({} if labels is None else {"class_labels": labels})).sample

        if args.objective in WITH_CHARGES:
            charges, classes = charges_of(batch, unet.training)
            classes = None if classes is None or labels is None else (labels, classes)
            loss = objectives.field_loss if args.objective == "field" else objectives.stable_target_loss
            return loss(network, clean, generators, scheduler, charges, classes)
        loss = objectives.denoiser_loss
        if args.objective not in POISSON:
            ddpm = args.objective in ("epsilon", "v_prediction")
            loss = objectives.ddpm_loss if ddpm else objectives.score_sde_loss
        return loss(network, clean, generators, scheduler)

    return compute_loss


def make_pipeline(args, accelerator, unet, scheduler, data, steps: int):
    """What is saved and pushed: the trained network with all that belongs to it, and the facts of its model card."""
    from tonefield.pipelines import MelPFGMPipeline
    from tonefield.training.publishing import training_facts

    defaults = parse_args(["--dataset_name=none"])
    card = training_facts("train_unet.py", args, defaults, accelerator)
    card |= {"objective": args.objective, "num_inference_steps": steps}
    label2id = {name: label for label, name in enumerate(data.class_names)} or None
    return MelPFGMPipeline(unet, scheduler, data.mel, card=card, label2id=label2id)


def main(args: argparse.Namespace) -> None:
    folder = prepare_output_dir(args.output_dir)

    from tonefield.training.data import open_data
    from tonefield.training.loop import make_accelerator, train
    from tonefield.training.publishing import find_repository, publish
    from tonefield.training.validation import draw_samples, show_samples, spread_labels

    accelerator = make_accelerator(args)
    repository = find_repository(args) if args.push_to_hub and accelerator.is_main_process else None
    data = open_data(args)
    unet, scheduler = make_unet(args, data), make_scheduler(args, data)
    if args.objective in WITH_CHARGES:
        prepare_charges(args, data, accelerator.num_processes)
    steps = args.num_inference_steps
    steps = steps or (18 if args.objective in POISSON else 50 if "prediction" in args.objective else 200)
    count = args.num_validation_samples
    labels = spread_labels(count, len(data.class_names))

    def generate(network, step: int) -> None:
        if count:
            samples = draw_samples(network, scheduler, data.sample_shape, count, steps, args.seed, labels)
            show_samples(samples, data, labels, folder / "samples", step, accelerator.trackers)

    parameters = sum(parameter.numel() for parameter in unet.parameters())
    classes = f"{len(data.class_names)} classes" if data.class_names else "no classes"
    accelerator.print(f"{parameters:,} parameters, {'x'.join(map(str, data.sample_shape))} samples, {classes}")
    fixed = {"objective": args.objective, "scheduler": settings_of(scheduler), "network": settings_of(unet)}
    loss = make_loss(args, scheduler, data, accelerator)
    trained = train(args, accelerator, unet, data, loss, generate, fixed)
    if trained is not None and accelerator.is_main_process:
        pipeline = make_pipeline(args, accelerator, trained, scheduler, data, steps)
        pipeline.save_pretrained(folder)
        about = {"flags": vars(args), "class_names": data.class_names} | fixed
        (folder / "training.json").write_text(json.dumps(about, indent=1, default=str))
        print(f"the pipeline is in {folder}")
        if repository is not None:
            publish(pipeline, folder, repository)
    accelerator.end_training()


def settings_of(component) -> dict:
    """The configuration of a network or scheduler."""
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def prepare_charges(args, data, num_processes: int) -> None:
    """Has each process read its share of the charges beside its batch."""
    least = args.train_batch_size * num_processes
    wanted = least if args.field_batch_size is None else args.field_batch_size
    if wanted < max(2, least):
        raise UserError(
            f"--objective {args.objective} with a field of {wanted} charges: --field_batch_size must be at least"
            f" {max(2, least)}, the samples of all processes and no less than two."
        )
    data.train.extra = -(-wanted // num_processes) - args.train_batch_size


if __name__ == "__main__":
    run(main, parse_args())
