"""Turns recordings into a dataset of mel spectrograms that the training scripts read.

    python audio_to_images.py --input_dir my_sounds --output_dir mels/my_sounds --previews 8
    python audio_to_images.py --input_dir digits --preset fsdd-64
    python audio_to_images.py --input_dir songs --preset bigvgan_v2_44khz_128band_512x --duration 10 --num_proc 8

A folder is searched to any depth. Folders directly below it are classes; a `metadata.csv` or `metadata.jsonl` with a
column `file_name` adds captions, labels and any other column. The settings of the spectrograms and the statistics of
the dataset are stored within it, so no later script asks for them. Files that cannot be used are listed in
`rejects.jsonl`.
"""

import argparse
import math
from pathlib import Path

from tonefield.command_line import UserError, make_parser, parse, run
from tonefield.data.arguments import (
    add_dataset_arguments,
    add_running_arguments,
    add_source_arguments,
    check_arguments,
)
from tonefield.files import write_sound


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_source_arguments(parser)
    front_end = parser.add_argument_group(
        "spectrograms", "A preset, or the default image-22k, changed by whichever of the other flags are given."
    )
    front_end.add_argument(
        "--preset",
        help="image-22k (22 kHz, 256 bands), sc09-64 or sc09-128 (16 kHz), fsdd-64 (8 kHz), or a vocoder: "
        "bigvgan_v2_44khz_128band_512x, bigvgan_v2_44khz_128band_256x, bigvgan_v2_24khz_100band_256x, "
        "bigvgan_v2_22khz_80band_256x, bigvgan_v2_22khz_80band_fmax8k_256x, bigvgan_24khz_100band, "
        "bigvgan_base_24khz_100band, bigvgan_22khz_80band, bigvgan_base_22khz_80band",
    )
    front_end.add_argument(
        "--resolution", metavar="W,H", help="frames and mel bands of a slice; one number means both"
    )
    front_end.add_argument(
        "--duration", type=float, metavar="SECONDS", help="length of a slice, rounded up to 16 frames"
    )
    front_end.add_argument("--sample_rate", type=int, metavar="HZ", help="recordings are resampled to this rate")
    front_end.add_argument("--hop_length", type=int, metavar="SAMPLES", help="from one frame to the next")
    front_end.add_argument("--n_fft", type=int, metavar="SAMPLES", help="length of the Fourier transform")
    front_end.add_argument(
        "--top_db", type=float, metavar="DB", help="how far the floor lies below full scale (default: 80)"
    )
    front_end.add_argument(
        "--ref", choices=["fixed", "slice"], help="0 dB is full scale (default), or a slice's loudest bin"
    )
    front_end.add_argument(
        "--mel_spec_method", choices=["image", "bigvgan"], help="decibels, or what BigVGAN vocoders read"
    )
    front_end.add_argument(
        "--bigvgan_model", metavar="NAME", help="the vocoder whose spectrograms to make; same as --preset"
    )

    cutting = parser.add_argument_group("slices")
    cutting.add_argument(
        "--pad",
        choices=["overlap", "pad", "drop"],
        default="overlap",
        help="what is left over at the end of a recording: a slice that reaches back (default), a slice filled up with"
        " silence, or nothing. The first two fill up recordings shorter than a slice.",
    )

    output = add_dataset_arguments(parser, "mels", "slices")
    output.add_argument(
        "--save_images", action="store_true", help="add a column of 8-bit pictures, for pipelines that train on those"
    )
    add_running_arguments(parser)
    args = parse(parser, argv)

    check_arguments(parser, args, "mels")
    if args.duration is not None and not 0 < args.duration < math.inf:
        parser.error(f"--duration is a number of seconds above 0, not {args.duration:g}")
    return args


def front_end_from(args):
    """The front end that the flags describe; a contradiction is refused with both values."""
    from tonefield.models.mel_spectrogram import PRESETS, MelSpectrogram

    preset = args.preset or args.bigvgan_model or "image-22k"
    if args.bigvgan_model and args.preset not in (None, args.bigvgan_model):
        raise UserError(f"--preset {args.preset} and --bigvgan_model {args.bigvgan_model} are not the same: give one.")
    if args.mel_spec_method == "bigvgan" and not preset.startswith("bigvgan"):
        raise UserError("--mel_spec_method bigvgan needs a --bigvgan_model, such as bigvgan_v2_22khz_80band_256x.")
    if args.mel_spec_method == "image" and preset.startswith("bigvgan"):
        raise UserError(f"--mel_spec_method image contradicts {preset}: leave one of them out.")
    if preset not in PRESETS:
        raise UserError(f"There is no preset {preset!r}; there are {', '.join(PRESETS)}.")

    names = ("sample_rate", "hop_length", "n_fft", "top_db", "ref")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.resolution:
        try:
            sizes = [int(size) for size in args.resolution.split(",")]
            width, height = sizes * 2 if len(sizes) == 1 else sizes
        except ValueError:
            raise UserError(f"--resolution {args.resolution} is not W,H or one number, such as 256,128.") from None
        changes |= {"num_frames": width, "n_mels": height}
    if preset.startswith("bigvgan"):
        config = MelSpectrogram.from_preset(preset).config
        for name, value in changes.items():
            if name != "num_frames" and config[name] != value:
                raise UserError(f"{preset} has {name} {config[name]}, which {value} contradicts: leave it out.")
    try:
        mel = MelSpectrogram.from_preset(preset, **changes)
        if args.duration is not None:
            if args.resolution and "," in args.resolution:
                raise UserError("--duration and the width of --resolution say the same thing: give one of them.")
            # Networks halve the width several times: a multiple of 16 suits all of ours.
            frames = -(-mel.frames_for(args.duration) // 16) * 16
            mel = MelSpectrogram.from_preset(preset, **changes | {"num_frames": frames})
    except ValueError as error:
        raise UserError(str(error)) from None
    return mel


def main(args: argparse.Namespace) -> None:
    from tonefield.data.building import build_dataset, end, open_source
    from tonefield.data.mel_converter import MelConverter

    mel = front_end_from(args)
    source = open_source(args)
    converter = MelConverter(mel, source.features, args.pad, args.silence_db, args.loudness, args.save_images)
    settings = {"pad": args.pad, "save_images": args.save_images, "front_end": converter.front_end_settings}
    add_files = (lambda folder: preview(args, mel, folder)) if args.previews else None
    defaults = parse_args(["--dataset_name=none"])
    end(args, build_dataset(args, defaults, source, converter, settings, "slices", add_files))


def preview(args: argparse.Namespace, mel, dataset_folder: Path) -> None:
    """Draws slices from all over the dataset, and turns them back into sound to show what the spectrograms hold."""
    import torch

    from tonefield.data.loading import load_split
    from tonefield.data.pictures import draw_mels
    from tonefield.data.publishing import PREVIEWS, preview_title, spread

    folder = dataset_folder / PREVIEWS
    folder.mkdir()
    dataset = load_split(str(dataset_folder)).with_format("torch")
    rows = dataset[spread(len(dataset), args.previews)]
    mels = torch.as_tensor(rows["mel"])
    reference = torch.as_tensor(rows["ref_db"]) if "ref_db" in rows else None
    sounds = mel.decode(mels, generator=torch.Generator().manual_seed(args.seed), reference=reference)
    titles = [
        preview_title({"audio_file": name, "slice": index})
        for name, index in zip(rows["audio_file"], rows["slice"], strict=True)
    ]
    draw_mels(mels[:16], mel, folder / "overview.png", titles)
    for index, sound in enumerate(sounds):
        draw_mels(mels[index : index + 1], mel, folder / f"{index:03d}.png", titles[index : index + 1])
        write_sound(folder / f"{index:03d}.wav", sound.clamp(-1, 1).numpy(), mel.config.sample_rate)
    print(f"{len(sounds)} slices drawn and turned back into sound in {Path(args.output_dir, 'previews')}")


if __name__ == "__main__":
    run(main, parse_args())
