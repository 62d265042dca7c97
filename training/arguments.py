"""The flags that all training scripts share, named as diffusers' training examples name them."""

import argparse
from argparse import BooleanOptionalAction
from pathlib import Path

from tonefield.command_line import UserError


VALIDATION_METRICS = ("fad", "kad", "kid")


def add_data_arguments(
    parser: argparse.ArgumentParser, max_validation_samples: int | None = 256
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", metavar="NAME", help="the dataset: a folder or a Hub id")
    group.add_argument("--dataset_config_name", metavar="NAME", help="its configuration")
    group.add_argument(
        "--train_split", default="train", metavar="NAME", help="the split to train on (default: %(default)s)"
    )
    group.add_argument(
        "--validation_split", default="validation", metavar="NAME", help="the held-out split (default: %(default)s)"
    )
    group.add_argument(
        "--streaming",
        action=BooleanOptionalAction,
        default=False,
        help="read it as it arrives instead of downloading it first; processes divide its shards if they can"
        " be dealt out evenly, otherwise every process reads it all",
    )
    group.add_argument(
        "--shuffle_buffer",
        type=int,
        default=1000,
        metavar="N",
        help="rows among which each process shuffles a streamed dataset (default: %(default)s)",
    )
    group.add_argument("--max_train_samples", type=int, metavar="N", help="use the first N rows only")
    group.add_argument(
        "--max_validation_samples",
        type=int,
        default=max_validation_samples,
        metavar="N",
        help=f"rows that the validation loss is taken of (default: {max_validation_samples or 'all'})",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read the data, of a stream up to 8 (default: none but the training's own)",
    )
    return group


def add_text_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of networks that are told a text."""
    group.add_argument("--caption_column", default="caption", metavar="NAME", help="the texts (default: %(default)s)")
    group.add_argument(
        "--text_encoder", metavar="NAME", help="tell the network the text: a T5 encoder, folder or Hub id"
    )
    group.add_argument(
        "--prompt_dropout",
        type=float,
        default=0.1,
        metavar="P",
        help="how often the text is withheld, for classifier-free guidance (default: %(default)s)",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--output_dir", default="outputs/train", metavar="DIR", help="where all goes (default: %(default)s)"
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="decides the initial weights, the noise and the order of the data (default: %(default)s)",
    )
    group.add_argument(
        "--train_batch_size",
        type=int,
        default=16,
        metavar="N",
        help="samples of a process at a time (default: %(default)s)",
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        metavar="N",
        help="batches before an optimizer step (default: %(default)s)",
    )
    group.add_argument(
        "--max_train_steps", type=int, default=100_000, metavar="N", help="optimizer steps (default: %(default)s)"
    )
    group.add_argument("--max_hours", type=float, metavar="HOURS", help="save and stop after this time")
    group.add_argument("--learning_rate", type=float, default=2e-4, help="(default: %(default)s)")
    group.add_argument(
        "--lr_scheduler",
        default="constant_with_warmup",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
        help="(default: %(default)s)",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=500, metavar="N", help="(default: %(default)s)")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="(default: %(default)s)")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="(default: %(default)s)")
    group.add_argument("--adam_weight_decay", type=float, default=0.0, help="(default: %(default)s)")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="(default: %(default)s)")
    group.add_argument(
        "--max_grad_norm",
        type=float,
        default=1.0,
        help="gradients are scaled down to this norm (default: %(default)s)",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="(default: what `accelerate config` says, otherwise no)",
    )
    group.add_argument(
        "--allow_tf32",
        action=BooleanOptionalAction,
        default=False,
        help="faster float32 products with fewer digits, on recent GPUs",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action=BooleanOptionalAction,
        default=False,
        help="compute activations twice instead of keeping them",
    )
    group.add_argument(
        "--use_ema",
        action=BooleanOptionalAction,
        default=True,
        help="average the weights; the average is what is validated and published (default: yes)",
    )
    group.add_argument("--ema_max_decay", type=float, default=0.9999, help="(default: %(default)s)")
    group.add_argument("--ema_inv_gamma", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument(
        "--ema_power",
        type=float,
        default=0.75,
        help="the decay after n steps is 1 - (1 + n / inv_gamma)^-power (default: %(default)s)",
    )

    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument(
        "--checkpointing_steps", type=int, default=1000, metavar="N", help="save every N steps (default: %(default)s)"
    )
    group.add_argument("--checkpoints_total_limit", type=int, metavar="N", help="keep the newest N only")
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="latest|PATH",
        help="continue from a checkpoint; a damaged newest one is skipped",
    )
    group.add_argument(
        "--validation_steps",
        type=int,
        default=1000,
        metavar="N",
        help="validate every N steps; 0: never (default: %(default)s)",
    )
    group.add_argument(
        "--num_validation_samples",
        type=int,
        default=4,
        metavar="N",
        help="what to generate then (default: %(default)s)",
    )
    group.add_argument(
        "--validation_metrics",
        nargs="+",
        choices=VALIDATION_METRICS,
        default=[],
        metavar="NAME",
        help="distances of what is generated then to what is held out: fad kad kid; generate 64 sounds or more for"
        " that (default: none)",
    )
    group.add_argument(
        "--validation_embedding",
        default="mel",
        metavar="NAME[=WEIGHTS]",
        help="what the distances are taken of; evaluate.py --help lists them (default: %(default)s)",
    )
    group.add_argument(
        "--best_metric",
        choices=["loss", *VALIDATION_METRICS],
        metavar="NAME",
        help="keep the weights with the lowest loss, or distance out of --validation_metrics, in `best`, and publish"
        " those (default: the last ones; of an autoencoder, the lowest loss)",
    )
    group.add_argument(
        "--logging_steps",
        type=int,
        default=10,
        metavar="N",
        help="read the loss every N steps; NaN is noticed then (default: %(default)s)",
    )
    group.add_argument(
        "--report_to",
        default="none",
        metavar="TRACKER",
        help="tensorboard, wandb, trackio, ... (default: %(default)s)",
    )
    group.add_argument("--tracker_project_name", default="tonefield", metavar="NAME", help="(default: %(default)s)")
    group.add_argument("--push_to_hub", action=BooleanOptionalAction, default=False, help="upload the result")
    group.add_argument("--hub_model_id", metavar="REPO_ID", help="where to (default: the name of the output folder)")
    group.add_argument("--hub_private_repo", action=BooleanOptionalAction, default=False, help="make it private")
    group.add_argument(
        "--test",
        action="store_true",
        help="go through the whole script in seconds: few rows, few steps, every step reported",
    )


def check_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, maker: str = "audio_to_images.py"
) -> None:
    """Refuses values without a meaning, and applies `--test`."""
    if args.test:
        shrink(args)
    if not (args.dataset_name or getattr(args, "input_dir", None)):
        parser.error(f"--dataset_name is needed: a folder made by {maker}, or a Hub id")
    least = dict.fromkeys(
        ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps", "logging_steps",
         "max_train_samples", "max_validation_samples", "checkpoints_total_limit", "shuffle_buffer"), 1,
    ) | dict.fromkeys(
        ("dataloader_num_workers", "lr_warmup_steps", "validation_steps", "num_validation_samples"), 0
    )  # fmt: skip
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            parser.error(f"--{name} is at least {bound}, not {value}")
    for name in ("learning_rate", "max_grad_norm", "max_hours", "adam_epsilon", "ema_inv_gamma", "ema_power"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be positive, not {value:g}")
    for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} lies between 0 and 1, not at {getattr(args, name):g}")
    check_validation(parser, args)


def check_validation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses distances and a best network that no validation would find."""
    for flag in ("validation_metrics", "best_metric"):
        if getattr(args, flag) and not args.validation_steps:
            parser.error(f"--{flag} needs validation, and --validation_steps is 0")
    if args.validation_metrics and args.num_validation_samples < 2:
        parser.error(
            f"--validation_metrics needs --num_validation_samples of 2 at least, not {args.num_validation_samples}"
        )
    if args.best_metric not in (None, "loss", *args.validation_metrics):
        parser.error(f"--best_metric {args.best_metric} needs --validation_metrics {args.best_metric}")


def shrink(args: argparse.Namespace) -> None:
    """What `--test` means; flags that make a run smaller still are kept."""
    for name, most in {
        "max_train_steps": 4, "train_batch_size": 4, "max_train_samples": 16, "max_validation_samples": 8,
        "checkpointing_steps": 2, "validation_steps": 2, "num_validation_samples": 2, "logging_steps": 1,
        "lr_warmup_steps": 1, "shuffle_buffer": 16,
    }.items():  # fmt: skip
        value = getattr(args, name)
        setattr(args, name, most if value is None else min(value, most))


def prepare_output_dir(path: str) -> Path:
    """Makes the output folder; writes into it, to find out now rather than at the first checkpoint."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"The output folder {folder} cannot be written to: {error.strerror}.") from None
    return folder
