"""Turns recordings into a dataset of tokens that train_sedd.py reads.

    python audio_to_tokens.py --input_dir digits --codec outputs/codec --output_dir tokens/digits --previews 8
    python audio_to_tokens.py --input_dir songs --codec facebook/encodec_24khz --device cuda --batch_size 32
    python audio_to_tokens.py --input_dir chirps --codec mulaw

A folder is searched to any depth. Folders directly below it are classes; a `metadata.csv` or `metadata.jsonl` with a
column `file_name` adds captions, labels and any other column. Every recording is resampled to the rate of the codec
and becomes one row. The codec is stored within the dataset, so no later script asks for it. Files that cannot be used
are listed in `rejects.jsonl`.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from tonefield.command_line import UserError, first_line, make_parser, parse, run
from tonefield.data.arguments import (
    add_dataset_arguments,
    add_running_arguments,
    add_source_arguments,
    check_arguments,
)
from tonefield.files import write_sound, writing


PREVIEW_SECONDS = 20


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_source_arguments(parser)
    codec = parser.add_argument_group("codec")
    codec.add_argument(
        "--codec",
        metavar="NAME",
        help="what makes tokens: mulaw, a folder that train_codec.py made, or a Hub id (EnCodec, DAC, Mimi)",
    )
    codec.add_argument("--device", metavar="NAME", help="where it computes (default: a GPU if there is one)")
    codec.add_argument(
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="recordings, or pieces of long ones, that a thread encodes at a time (default: %(default)s)",
    )
    codec.add_argument(
        "--chunk_seconds",
        type=float,
        default=20,
        metavar="S",
        help="longer recordings are encoded in pieces of this length, each with what surrounds it; less memory with"
        " less (default: %(default)s)",
    )
    add_dataset_arguments(parser, "tokens", "recordings")
    add_running_arguments(parser)
    args = parse(parser, argv)

    check_arguments(parser, args, "tokens")
    if args.codec is None:
        parser.error("--codec is needed: mulaw, a folder that train_codec.py made, or a Hub id")
    if args.batch_size < 1:
        parser.error(f"--batch_size is at least 1, not {args.batch_size}")
    if not 0 < args.chunk_seconds < math.inf:
        parser.error(f"--chunk_seconds is a number of seconds above 0, not {args.chunk_seconds:g}")
    return args


def open_codec(args: argparse.Namespace):
    """The codec on its device, ready to encode."""
    import torch

    from tonefield.models import load_audio_tokenizer

    try:
        codec: Any = load_audio_tokenizer(args.codec)
    except (OSError, ValueError) as error:
        raise UserError(f"--codec {args.codec} cannot be loaded: {first_line(error)}") from None
    try:
        return codec.eval().to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build
        raise UserError(f"--device {args.device} cannot be used: {first_line(error)}") from None


def main(args: argparse.Namespace) -> None:
    from tonefield.data.building import build_dataset, end, open_source
    from tonefield.data.dataset_builder import RESUME
    from tonefield.data.loading import CODEC_FOLDER
    from tonefield.data.token_converter import TokenConverter

    codec = open_codec(args)
    source = open_source(args)
    converter = TokenConverter(
        codec, source.features, args.silence_db, args.loudness, args.batch_size, args.chunk_seconds
    )
    settings = {"batch_size": args.batch_size, "chunk_seconds": args.chunk_seconds, "codec": converter.codec_record}

    def add_files(folder: Path) -> None:
        with writing(folder / CODEC_FOLDER, RESUME):
            codec.save_pretrained(folder / CODEC_FOLDER)
        if args.previews:
            preview(args, codec, folder)

    defaults = parse_args(["--dataset_name=none", "--codec=none"])
    end(args, build_dataset(args, defaults, source, converter, settings, "recordings", add_files))


def preview(args: argparse.Namespace, codec, dataset_folder: Path) -> None:
    """Turns rows from all over the dataset back into sound, which shows what the codec keeps."""
    import torch

    from tonefield.data.loading import load_split
    from tonefield.data.pictures import draw_sounds
    from tonefield.data.publishing import PREVIEWS, preview_title, spread

    folder = dataset_folder / PREVIEWS
    folder.mkdir()
    dataset = load_split(str(dataset_folder))
    places, frames = spread(len(dataset), args.previews), codec.num_frames(PREVIEW_SECONDS * codec.sampling_rate)
    for index, place in enumerate(places):
        row = dataset[place]
        codes = torch.tensor(row["codes"])[None, :, :frames].to(codec.device)
        sound = codec.decode(codes)[0, : row["num_samples"]].clamp(-1, 1).cpu()
        draw_sounds(sound[None], codec.sampling_rate, folder / f"{index:03d}.png", [preview_title(row)])
        write_sound(folder / f"{index:03d}.wav", sound.numpy(), codec.sampling_rate)
    print(f"{len(places)} recordings drawn and turned back into sound in {Path(args.output_dir, PREVIEWS)}")


if __name__ == "__main__":
    run(main, parse_args())
