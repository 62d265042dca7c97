"""Recordings that a command is given, of a folder or a dataset, with what is known of them."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, printable
from tonefield.evaluation.arguments import add_num_workers


if TYPE_CHECKING:
    import numpy as np

    from tonefield.data.audio_folder import Recording


MOST_REASONS = 10  # files that are left out by name; of the others it is told how many they are


def add_source_arguments(parser: argparse.ArgumentParser, folder: str, split: str) -> Any:
    """The flags that name recordings; what `--input_dir` is, and the split that is read, depends on the command."""
    data = parser.add_argument_group("recordings")
    data.add_argument("--input_dir", metavar="DIR", help=folder)
    data.add_argument("--dataset_name", metavar="NAME", help="instead: a dataset, a folder or its id on the Hub")
    data.add_argument("--dataset_config_name", metavar="NAME", help="which configuration of the dataset")
    data.add_argument("--split", default=split, metavar="NAME", help="which split of it (default: %(default)s)")
    data.add_argument(
        "--audio_column", default="audio", metavar="NAME", help="the dataset's recordings (default: %(default)s)"
    )
    add_num_workers(data)
    return data


def check_source(args: argparse.Namespace) -> None:
    if bool(args.input_dir) == bool(args.dataset_name):
        raise UserError("Give --input_dir or --dataset_name, one of them.")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name} must be positive, not {getattr(args, name):g}.")


def open_source(args: argparse.Namespace) -> Any:
    """What the flags name: iterates over recordings, and has `features`."""
    from tonefield.data.audio_folder import AudioColumn, AudioFolder
    from tonefield.data.loading import load_split

    if args.input_dir:
        return AudioFolder(args.input_dir)
    return AudioColumn(load_split(args.dataset_name, args.split, False, args.dataset_config_name), args.audio_column)


def usual_rate(recordings: "Sequence[Recording]") -> int | None:
    """The most frequent sampling rate of the first thousand recordings; `None` if none can be told."""
    import soundfile

    def rate_of(audio: Any) -> int | None:
        try:
            return soundfile.info(BytesIO(audio) if isinstance(audio, bytes) else str(audio)).samplerate
        except soundfile.SoundFileError:  # ffmpeg's, or damaged, which reading will tell
            return None

    rates = Counter(rate_of(recording.audio) for recording in recordings[:1000])
    del rates[None]
    return rates.most_common(1)[0][0] if rates else None


def read_recordings(
    recordings: "Sequence[Recording]", sampling_rate: int, num_workers: int, rejects: Sequence[tuple[str, str]] = ()
) -> "tuple[list[Recording], list[np.ndarray]]":
    """Those that can be read, and their sounds, mono at a rate. Those that cannot, and `rejects`, are named."""
    from tqdm.auto import tqdm

    from tonefield.data.audio_files import AudioError, read_audio
    from tonefield.evaluation.sets import in_parallel

    def read(recording: "Recording") -> "np.ndarray | AudioError":
        try:
            if recording.audio is None:
                raise AudioError("has no audio")
            return read_audio(recording.audio, sampling_rate)
        except AudioError as error:
            return error

    kept, sounds, rejected = [], [], list(rejects)
    bar = tqdm(in_parallel(read, recordings, num_workers), "reading", len(recordings), unit="file", disable=None)
    for recording, sound in zip(recordings, bar, strict=True):
        if isinstance(sound, AudioError):
            rejected.append((recording.name, str(sound)))
        else:
            kept.append(recording)
            sounds.append(sound)
    for name, reason in rejected[:MOST_REASONS]:
        print(f"left out: {printable(name)} {reason}", file=sys.stderr)
    if len(rejected) > MOST_REASONS:
        print(f"left out: {len(rejected) - MOST_REASONS} more", file=sys.stderr)
    if not kept:
        raise UserError(
            f"None of {len(rejected)} recordings can be used; {rejected[0][0]} {rejected[0][1]}."
            if rejected
            else "There are no recordings."
        )
    return kept, sounds
