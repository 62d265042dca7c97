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
import os
import sys

from tonefield.command_line import UserError, first_line, make_parser, parse, run


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    source = parser.add_argument_group("recordings")
    source.add_argument(
        "--input_dir", metavar="DIR", help="a folder of recordings (wav, flac, ogg, mp3; m4a with ffmpeg)"
    )
    source.add_argument(
        "--dataset_name", metavar="NAME", help="instead: a dataset with an audio column, Hub id or folder"
    )
    source.add_argument("--dataset_config_name", metavar="NAME", help="its configuration")
    source.add_argument("--split", default="train", help="its split (default: %(default)s)")
    source.add_argument(
        "--audio_column", default="audio", metavar="NAME", help="its audio column (default: %(default)s)"
    )
    source.add_argument(
        "--streaming", action="store_true", help="read it as it arrives instead of downloading it first"
    )

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
    cutting.add_argument(
        "--silence_db",
        type=float,
        default=-60,
        metavar="DB",
        help="skip slices that peak below this level (default: %(default)s dB of full scale)",
    )
    cutting.add_argument(
        "--loudness",
        type=float,
        metavar="LUFS",
        help="bring each recording to this loudness, say -14, as far as its peaks allow; the gain is stored",
    )
    cutting.add_argument("--max_examples", type=int, metavar="N", help="stop after this many slices")

    output = parser.add_argument_group("dataset")
    output.add_argument(
        "--output_dir", metavar="DIR", help="where the dataset is written (default: mels/ and the name of the source)"
    )
    output.add_argument(
        "--validation_fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the files held out for validation (default: %(default)s)",
    )
    output.add_argument(
        "--test_fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of the files held out for a test (default: none)",
    )
    output.add_argument(
        "--seed",
        type=int,
        default=0,
        help="decides which files are held out, and the order of all (default: %(default)s)",
    )
    output.add_argument(
        "--save_images", action="store_true", help="add a column of 8-bit pictures, for pipelines that train on those"
    )
    output.add_argument(
        "--previews",
        type=int,
        default=0,
        metavar="N",
        help="draw N slices and turn them back into sound, in DIR/previews",
    )
    output.add_argument("--push_to_hub", metavar="REPO_ID", help="upload the dataset")
    output.add_argument("--hub_private_repo", action="store_true", help="make the uploaded dataset private")

    running = parser.add_argument_group("running")
    running.add_argument(
        "--num_proc",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="threads that read and compute side by side (default: one a core, here %(default)s)",
    )
    running.add_argument("--resume", action="store_true", help="take up a run that was stopped")
    running.add_argument("--strict", action="store_true", help="exit with an error if any file was rejected")
    args = parse(parser, argv)

    if (args.input_dir is None) == (args.dataset_name is None):
        parser.error("give --input_dir or --dataset_name, one of them")
    if args.output_dir is None:
        args.output_dir = os.path.join("mels", os.path.basename(os.path.abspath(args.input_dir or args.dataset_name)))
    for name, least in ("num_proc", 1), ("max_examples", 1), ("previews", 0):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} is at least {least}, not {value}")
    if args.duration is not None and not 0 < args.duration < math.inf:
        parser.error(f"--duration is a number of seconds above 0, not {args.duration:g}")
    fractions = args.validation_fraction, args.test_fraction
    if not (min(fractions) >= 0 and sum(fractions) < 1):
        parser.error(
            "--validation_fraction {:g} and --test_fraction {:g} must leave something to train on".format(*fractions)
        )
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
    import datasets

    from tonefield.data.audio_folder import AudioColumn, AudioFolder
    from tonefield.data.dataset_builder import DatasetBuilder, plan_parts, write_rejects
    from tonefield.data.loading import RECORD_COLUMN, load_split, record_feature
    from tonefield.data.mel_converter import MelConverter

    datasets.disable_progress_bars()
    mel = front_end_from(args)
    if args.input_dir is not None:
        source = AudioFolder(args.input_dir)
        total_bytes = sum(recording.size for recording in source)
    else:
        dataset = load_split(args.dataset_name, args.split, args.streaming, args.dataset_config_name)
        source, total_bytes = AudioColumn(dataset, args.audio_column), 0
    for warning in source.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    converter = MelConverter(mel, source.features, args.pad, args.silence_db, args.loudness, args.save_images)

    held_out = {"validation": args.validation_fraction, "test": args.test_fraction}
    names = (
        "input_dir",
        "dataset_name",
        "dataset_config_name",
        "split",
        "audio_column",
        "pad",
        "silence_db",
        "loudness",
        "max_examples",
        "seed",
        "save_images",
    )
    settings = {name: getattr(args, name) for name in names} | held_out | {"front_end": converter.front_end_settings}
    builder = DatasetBuilder(args.output_dir, settings, args.resume)
    parts = plan_parts(source, held_out, args.seed)
    parts = builder.run(parts, converter, args.num_proc, args.max_examples, held_out, total_bytes)
    result = builder.result(parts, source.rejects)

    if not result.rows.get("train"):
        rejects = builder.output_dir.with_name(builder.output_dir.name + "-rejects.jsonl")
        write_rejects(rejects, result.rejects)
        builder.discard()
        first = f"; the first: {': '.join(result.rejects[0])}" if result.rejects else ""
        raise UserError(
            f"No slice came of {result.recordings} recordings: {len(result.rejects)} files were rejected (see"
            f" {rejects}"
            f"{first}), {result.skipped} slices were silent."
        )
    record = converter.record(result.sums["train"])
    builder.finish(parts, result, datasets.Features(converter.features | {RECORD_COLUMN: record_feature(record)}))

    minutes = f"{result.seconds / 60:.1f} minutes"
    print(f"{sum(result.rows.values())} slices from {result.recordings} recordings ({minutes}) in {args.output_dir}: "
          + ", ".join(f"{count} {split}" for split, count in result.rows.items()))  # fmt: skip
    if result.skipped:
        print(f"{result.skipped} slices were skipped: they peak below {args.silence_db:g} dB.")
    if result.rejects:
        name, reason = result.rejects[0]
        print(f"{len(result.rejects)} files were rejected, see rejects.jsonl; the first: {name} {reason}.")
    if args.previews:
        preview(args, mel)
    if args.strict and result.rejects:
        raise UserError(f"--strict: {len(result.rejects)} files were rejected, see {args.output_dir}/rejects.jsonl.")
    if args.push_to_hub:
        push(args)


def preview(args: argparse.Namespace, mel) -> None:
    """Draws slices from all over the dataset, and turns them back into sound to show what the spectrograms hold."""
    from pathlib import Path

    import soundfile
    import torch

    from tonefield.data.loading import load_split
    from tonefield.data.pictures import draw_mels

    folder = Path(args.output_dir, "previews")
    folder.mkdir()
    dataset = load_split(args.output_dir).with_format("torch")
    count = min(args.previews, len(dataset))
    rows = dataset[[index * len(dataset) // count for index in range(count)]]
    mels = torch.as_tensor(rows["mel"])
    reference = torch.as_tensor(rows["ref_db"]) if "ref_db" in rows else None
    sounds = mel.decode(mels, generator=torch.Generator().manual_seed(args.seed), reference=reference)
    titles = [f"{name} #{index}" for name, index in zip(rows["audio_file"], rows["slice"].tolist(), strict=True)]
    draw_mels(mels[:16], mel, folder / "overview.png", titles)
    for index, sound in enumerate(sounds):
        draw_mels(mels[index : index + 1], mel, folder / f"{index:03d}.png", titles[index : index + 1])
        soundfile.write(folder / f"{index:03d}.wav", sound.clamp(-1, 1).numpy(), mel.config.sample_rate)
    print(f"{len(sounds)} slices drawn and turned back into sound in {folder}")


def push(args: argparse.Namespace) -> None:
    """Uploads the dataset."""
    from datasets import load_from_disk
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        load_from_disk(args.output_dir).push_to_hub(args.push_to_hub, private=args.hub_private_repo or None)
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"The dataset is complete in {args.output_dir}, but could not be pushed to {args.push_to_hub}:"
            f" {first_line(error)}"
        ) from None
    print(f"pushed to {args.push_to_hub}")


if __name__ == "__main__":
    run(main, parse_args())
