"""The flags that all scripts which make datasets share."""

import argparse
import os


# What the rows depend on, of the flags below: a stopped run is only taken up again with the same.
SOURCE_SETTINGS = (
    "input_dir", "dataset_name", "dataset_config_name", "split", "audio_column", "silence_db", "loudness",
    "max_examples", "seed",
)  # fmt: skip


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recordings")
    group.add_argument(
        "--input_dir", metavar="DIR", help="a folder of recordings (wav, flac, ogg, mp3; m4a with ffmpeg)"
    )
    group.add_argument(
        "--dataset_name", metavar="NAME", help="instead: a dataset with an audio column, Hub id or folder"
    )
    group.add_argument("--dataset_config_name", metavar="NAME", help="its configuration")
    group.add_argument("--split", default="train", help="its split (default: %(default)s)")
    group.add_argument(
        "--audio_column", default="audio", metavar="NAME", help="its audio column (default: %(default)s)"
    )
    group.add_argument(
        "--streaming", action="store_true", help="read it as it arrives instead of downloading it first"
    )


def add_dataset_arguments(parser: argparse.ArgumentParser, folder: str, rows: str) -> argparse._ArgumentGroup:
    """`folder` holds the datasets of a script, `rows` is what it calls their rows."""
    group = parser.add_argument_group("dataset")
    group.add_argument(
        "--output_dir",
        metavar="DIR",
        help=f"where the dataset is written (default: {folder}/ and the name of the source)",
    )
    group.add_argument(
        "--silence_db",
        type=float,
        default=-60,
        metavar="DB",
        help=f"skip {rows} that peak below this level (default: %(default)s dB of full scale)",
    )
    group.add_argument(
        "--loudness",
        type=float,
        metavar="LUFS",
        help="bring each recording to this loudness, say -14, as far as its peaks allow; the gain is stored",
    )
    group.add_argument("--max_examples", type=int, metavar="N", help=f"stop after this many {rows}")
    group.add_argument(
        "--validation_fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the files held out for validation (default: %(default)s)",
    )
    group.add_argument(
        "--test_fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of the files held out for a test (default: none)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="decides which files are held out, and the order of all (default: %(default)s)",
    )
    group.add_argument(
        "--previews",
        type=int,
        default=0,
        metavar="N",
        help=f"draw N {rows} and turn them back into sound, in DIR/previews",
    )
    group.add_argument("--push_to_hub", metavar="REPO_ID", help="upload the dataset")
    group.add_argument("--hub_private_repo", action="store_true", help="make the uploaded dataset private")
    return group


def add_running_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--num_proc",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="threads that read and compute side by side (default: one a core, here %(default)s)",
    )
    group.add_argument("--resume", action="store_true", help="take up a run that was stopped")
    group.add_argument(
        "--num_shards",
        type=int,
        metavar="N",
        help="divide the work among N runs of this command, say the jobs of an array; they share --output_dir",
    )
    group.add_argument("--shard_index", type=int, metavar="I", help="which of them this is, from 0 to N - 1")
    group.add_argument(
        "--merge", action="store_true", help="put together what the N runs have made, after the last of them"
    )
    group.add_argument("--strict", action="store_true", help="exit with an error if any file was rejected")
    return group


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, folder: str) -> None:
    """Refuses values without a meaning; chooses the output folder when none is given."""
    if (args.input_dir is None) == (args.dataset_name is None):
        parser.error("give --input_dir or --dataset_name, one of them")
    if args.output_dir is None:
        args.output_dir = os.path.join(folder, os.path.basename(os.path.abspath(args.input_dir or args.dataset_name)))
    for name, least in ("num_proc", 1), ("max_examples", 1), ("previews", 0):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} is at least {least}, not {value}")
    fractions = args.validation_fraction, args.test_fraction
    if not (min(fractions) >= 0 and sum(fractions) < 1):
        parser.error(
            "--validation_fraction {:g} and --test_fraction {:g} must leave something to train on".format(*fractions)
        )
    check_shards(parser, args)


def check_shards(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    count, index = args.num_shards, args.shard_index
    if args.merge and (count, index) != (None, None):
        parser.error("--merge is for the run after those with --num_shards and --shard_index: leave these out")
    if (count is None) != (index is None):
        parser.error("--num_shards and --shard_index go together: give both")
    if count is not None and not 0 <= index < count:
        parser.error(f"--shard_index {index} must lie between 0 and {count - 1}, for --num_shards {count}")
    if args.max_examples is not None and (args.merge or count is not None):
        parser.error("--max_examples counts all rows, which runs side by side cannot: leave it out")
