"""From flags to a dataset: the course of every script that turns recordings into rows."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
from datasets import Features

from tonefield.command_line import UserError, command_of, printable
from tonefield.data.arguments import SOURCE_SETTINGS
from tonefield.data.audio_folder import AudioColumn, AudioFolder
from tonefield.data.dataset_builder import (
    REJECTS,
    Converter,
    DatasetBuilder,
    plan_parts,
    read_rejects,
    write_rejects,
)
from tonefield.data.loading import RECORD_COLUMN, load_split, record_feature
from tonefield.data.publishing import publish_dataset
from tonefield.hub import license_of


def open_source(args: argparse.Namespace) -> AudioFolder | AudioColumn:
    """The recordings that the flags name."""
    datasets.disable_progress_bars()
    if args.input_dir is not None:
        source = AudioFolder(args.input_dir)
    else:
        dataset = load_split(args.dataset_name, args.split, args.streaming, args.dataset_config_name)
        source = AudioColumn(dataset, args.audio_column)
    for warning in source.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    return source


# Flags of one machine or one start, which the command in the dataset's card leaves out.
LOCAL_FLAGS = ("config", "output_dir", "num_proc", "num_shards", "shard_index", "merge", "resume", "strict", "device",
               "push_to_hub", "hub_private_repo")  # fmt: skip


def build_dataset(
    args: argparse.Namespace,
    defaults: argparse.Namespace,
    source: AudioFolder | AudioColumn,
    converter: Converter,
    settings: dict,
    rows: str,
    add_files: Callable[[Path], None] | None = None,
) -> list[tuple[str, str]] | None:
    """
    Writes the dataset, says what came of the recordings, and returns those that were rejected, with the reasons. Of a
    shard it writes the parts, and returns nothing.

    Args:
        args: The flags of `tonefield.data.arguments`.
        defaults: The same where none is given.
        settings: What the rows depend on besides the source.
        rows: What the script calls its rows.
        add_files: Puts files into the folder of the dataset before it takes its place.
    """
    held_out = {"validation": args.validation_fraction, "test": args.test_fraction}
    settings = {name: getattr(args, name) for name in SOURCE_SETTINGS} | held_out | settings
    total_bytes = sum(recording.size for recording in source) if isinstance(source, AudioFolder) else 0
    shard = None if args.num_shards is None else (args.shard_index, args.num_shards)
    builder = DatasetBuilder(args.output_dir, settings, args.resume, shard, args.merge)
    plan = plan_parts(source, held_out, args.seed)
    if builder.complete:
        builder.confirm(plan)
        print(f"The dataset in {args.output_dir} is finished already.")
        return read_rejects(builder.output_dir / REJECTS)
    if args.merge:
        parts = builder.gather(plan)
    else:
        parts = builder.run(plan, converter, args.num_proc, args.max_examples, held_out, total_bytes)
    result = builder.result(parts, source.rejects)
    if shard is not None:
        print(f"shard {args.shard_index} of {args.num_shards}: {sum(result.rows.values())} {rows} from"
              f" {result.recordings} recordings in {builder.work}. When all shards are there: --merge")  # fmt: skip
        return None

    if not result.rows.get("train"):
        rejects = builder.output_dir.with_name(builder.output_dir.name + "-rejects.jsonl")
        write_rejects(rejects, result.rejects)
        builder.discard()
        first = f"; the first: {': '.join(result.rejects[0])}" if result.rejects else ""
        raise UserError(
            f"No {rows.removesuffix('s')} came of {result.recordings} recordings: {len(result.rejects)} files were"
            f" rejected (see {rejects}{first}), {result.skipped} {rows} were silent."
        )
    record = converter.record(result.sums["train"])
    features = Features(converter.features | {RECORD_COLUMN: record_feature(record)})
    maker = "audio_to_tokens.py" if "codec" in record else "audio_to_images.py"
    about = {"description": command_of(["python", maker], args, defaults, LOCAL_FLAGS)}
    if args.dataset_name is not None:
        about["license"] = license_of(args.dataset_name) or ""
    builder.finish(parts, result, features, add_files, about)

    minutes = f"{result.seconds / 60:.1f} minutes"
    print(f"{sum(result.rows.values())} {rows} from {result.recordings} recordings ({minutes}) in {args.output_dir}: "
          + ", ".join(f"{count} {split}" for split, count in result.rows.items()))  # fmt: skip
    if result.skipped:
        print(f"{result.skipped} {rows} were skipped: they peak below {args.silence_db:g} dB.")
    if result.rejects:
        name, reason = result.rejects[0]
        print(f"{len(result.rejects)} files were rejected, see rejects.jsonl; the first: {printable(name)} {reason}.")
    return result.rejects


def end(args: argparse.Namespace, rejects: list[tuple[str, str]] | None) -> None:
    """What `--strict` and `--push_to_hub` want of a dataset that is complete, which a shard is not."""
    if rejects is None:
        return
    if args.strict and rejects:
        raise UserError(f"--strict: {len(rejects)} files were rejected, see {args.output_dir}/rejects.jsonl.")
    if args.push_to_hub:
        publish_dataset(args.output_dir, args.push_to_hub, args.hub_private_repo or None)
