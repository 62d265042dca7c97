"""Trains a small audio codec, the FSQCodec, on recordings: sound to one code a frame, and back.

    python train_codec.py --input_dir my_songs --output_dir codecs/songs
    python train_codec.py --config recipes/fsdd-codec-cpu.yaml --input_dir digits --output_dir codecs/digits
    accelerate launch --num_processes 8 train_codec.py --dataset_name someone/songs --preset music-24k
    python train_codec.py --input_dir my_songs --test

Recordings of any rate and format are mixed to mono, resampled to the codec's rate and read in random crops. Some whole
recordings are held out: what the codec makes of them is measured (`metrics.jsonl`) and can be heard and seen
(`samples`). --output_dir receives `checkpoint-<step>` folders and at the end the codec, with the averaged weights:

    codec = load_audio_tokenizer("codecs/songs")
    codes = codec.encode(waveform, sampling_rate)      # (batch, samples) -> (batch, 1, frames)
    waveform = codec.decode(codes)

What is reported of the held-out recordings:
    si_sdr_db              signal to distortion; a codec of few bits does not keep phases, so expect little
    spectral_distance_db   mean distance of magnitudes in dB, over windows of 16 to 128 ms
    mel_distance_db        the same for 64 mel bands: what an ear is closest to
    code_perplexity        how many codes are in use, e to the entropy of their frequencies
"""

import argparse
import hashlib
import json
import math
import shutil
from pathlib import Path

from tonefield.command_line import UserError, first_line, make_parser, parse, run
from tonefield.files import write_sound, write_text, writing
from tonefield.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    prepare_output_dir,
)


VALIDATION_SECONDS = 10  # of each held-out recording


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    data = add_data_arguments(parser)
    data.add_argument("--input_dir", metavar="DIR", help="instead of a dataset: a folder of recordings, to any depth")
    data.add_argument(
        "--audio_column", default="audio", metavar="NAME", help="the dataset's recordings (default: %(default)s)"
    )
    data.add_argument(
        "--validation_fraction",
        type=float,
        default=0.05,
        metavar="P",
        help="how many recordings of a folder are held out (default: %(default)s)",
    )
    data.add_argument(
        "--crop_seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="length of a training sample; silence follows a shorter recording (default: %(default)s)",
    )

    model = parser.add_argument_group("codec")
    model.add_argument("--preset", default="music-24k", help="music-24k (default) or digits-8k: rate, frames, size")
    model.add_argument("--codec_config", metavar="FILE", help="arguments of FSQCodec over the preset's, JSON or YAML")
    model.add_argument(
        "--waveform_weight",
        type=float,
        default=10.0,
        metavar="W",
        help="weight of the L1 distance of waveforms beside that of spectra (default: %(default)s)",
    )
    add_training_arguments(parser)
    args = parse(parser, argv)

    check_arguments(parser, args)
    if args.input_dir and args.dataset_name:
        parser.error("give --input_dir or --dataset_name, one of them")
    if args.input_dir and args.streaming:
        parser.error("--streaming is for a --dataset_name, not for --input_dir")
    if not 0 < args.validation_fraction < 1:
        parser.error(f"--validation_fraction lies between 0 and 1, not at {args.validation_fraction:g}")
    if not args.crop_seconds > 0:
        parser.error(f"--crop_seconds must be positive, not {args.crop_seconds:g}")
    if not args.waveform_weight >= 0:
        parser.error(f"--waveform_weight is at least 0, not {args.waveform_weight:g}")
    return args


def make_codec(args):
    """A new codec: the preset's, with what the configuration file changes."""
    import torch
    import yaml

    from tonefield.models import FSQCodec

    changes = {}
    if args.codec_config:
        try:
            changes = yaml.safe_load(Path(args.codec_config).read_text())  # YAML contains JSON
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--codec_config {args.codec_config} cannot be read: {first_line(error)}") from None
        if not isinstance(changes, dict):
            raise UserError(f"--codec_config {args.codec_config} must consist of the arguments of FSQCodec.")
        changes = {name: value for name, value in changes.items() if not name.startswith("_")}
    torch.manual_seed(args.seed)
    try:
        return FSQCodec.from_preset(args.preset, **changes)
    except (TypeError, ValueError) as error:
        raise UserError(f"The codec cannot be built: {first_line(error)}") from None


def whole(recordings, rate: int) -> tuple[list, int]:
    """The held-out recordings, as far as they are measured, and their rate."""
    most = VALIDATION_SECONDS * rate
    sounds = [recordings.crop(index, 0, min(recordings.length(index), most)) for index in range(len(recordings))]
    return sounds, rate


def make_mel(sampling_rate: int):
    """What the mel distance is taken of: 64 bands or, at low rates, fewer; windows of about 64 ms; 80 dB."""
    from tonefield.models import MelSpectrogram
    from tonefield.training.spectral import window_sizes

    n_fft = window_sizes(sampling_rate)[2]
    return MelSpectrogram(sampling_rate, n_fft, n_fft // 4, min(64, sampling_rate // 60))


def measure(codec, recordings, mel) -> tuple[dict[str, float], list[tuple]]:
    """What is reported of a codec, and each recording with what the codec makes of it, on the CPU."""
    import torch

    from tonefield.training.spectral import perplexity, si_sdr, spectral_distances, window_sizes

    sizes, decibel = window_sizes(codec.sampling_rate), 20 / math.log(10)
    low, high = mel.value_range
    values, codes, pairs = [], [], []
    with torch.no_grad():
        for index in range(len(recordings)):
            samples = min(recordings.length(index), VALIDATION_SECONDS * codec.sampling_rate)
            target = torch.from_numpy(recordings.crop(index, 0, samples))[None].to(codec.device)
            estimate, code = codec(target, return_dict=False)
            difference = (mel.encode(estimate) - mel.encode(target)).abs().mean()
            distance = spectral_distances(estimate, target, sizes)[1][0]
            ratio = si_sdr(estimate, target)[0].float()
            values.append(torch.stack([ratio, distance * decibel, difference * (high - low) / 2]))
            codes.append(code)
            pairs.append((target[0].cpu(), estimate[0].cpu()))
        means = torch.stack(values).mean(0).tolist()
        used = perplexity(torch.cat(codes, dim=2), codec.codebook_size)
    names = ("si_sdr_db", "spectral_distance_db", "mel_distance_db", "code_perplexity")
    return dict(zip(names, [*means, used], strict=True)), pairs


def show(pairs: list[tuple], mel, folder: Path, step: int, trackers: list) -> None:
    """Originals and what became of them: as WAV, side by side in one picture, and in the trackers."""
    import torch
    from torch.nn.functional import pad

    from tonefield.data.pictures import draw_mels
    from tonefield.training.validation import track

    folder.mkdir(parents=True, exist_ok=True)
    rate = mel.config.sample_rate
    mels = [mel.encode(torch.stack(pair).cpu()) for pair in pairs]
    longest = max(pair.shape[-1] for pair in mels)
    mels = torch.cat([pad(pair, (0, longest - pair.shape[-1]), value=-1.0) for pair in mels])
    titles = [title for index in range(len(pairs)) for title in (f"original {index}", f"step {step}")]
    picture = folder / f"step-{step:07d}.png"
    draw_mels(mels, mel, picture, titles)
    sounds = [estimate.clamp(-1, 1).numpy() for _, estimate in pairs]
    for index, (target, _) in enumerate(pairs):
        write_sound(folder / f"original-{index}.wav", target.numpy(), rate)
        write_sound(folder / f"step-{step:07d}-{index}.wav", sounds[index], rate)
    for tracker in trackers:
        track(tracker, picture, sounds, rate, step)


def write_codec(args, accelerator, folder: Path, codec, about: dict, repository: str) -> None:
    """The codec, a card, and how it was made."""
    from tonefield.training.publishing import last_metrics, training_facts, write_card

    codec.save_pretrained(folder)
    write_text(folder / "training.json", json.dumps({"flags": vars(args)} | about, indent=1, default=str))
    name = repository or folder.resolve().name
    rate, books = codec.sampling_rate / codec.hop_length, codec.num_codebooks
    titles = [f"recording {index}, from its codes" for index in range(args.num_validation_samples)]
    facts = training_facts("train_codec.py", args, parse_args(["--dataset_name=none"]), accelerator, titles)
    measured = last_metrics(folder / "metrics.jsonl")
    for key in ("si_sdr_db", "spectral_distance_db", "mel_distance_db"):
        facts[f"held out: {key.removesuffix('_db')}"] = f"{measured[key]:.2f} dB" if key in measured else None
    shown = []
    for path, title in facts["samples"] or []:
        index = path.removesuffix(".wav").rpartition("-")[2]
        shown += [(f"samples/original-{index}.wav", f"recording {index}")] if path.endswith(".wav") else []
        shown.append((path, title))
    write_card(
        folder, name,
        f"An audio codec, {codec.sampling_rate} Hz mono to {rate:g} x {books} codes a second out of"
        f" {codec.codebook_size}, with {codec.num_parameters():,} parameters.",
        facts | {"samples": shown},
        f'from tonefield.models import load_audio_tokenizer\n\n\ncodec = load_audio_tokenizer("{name}")\n'
        "codes = codec.encode(waveform, sampling_rate)\nwaveform = codec.decode(codes)",
        ["codec"], "tonefield",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    folder = prepare_output_dir(args.output_dir)
    codec = make_codec(args)  # refused before any recording is read

    from tonefield.training.checkpoints import CONTINUE
    from tonefield.training.loop import make_accelerator, train
    from tonefield.training.publishing import find_repository, publish_folder, settings_of
    from tonefield.training.recordings import open_audio
    from tonefield.training.spectral import codec_loss, window_sizes
    from tonefield.training.validation import with_metrics

    accelerator = make_accelerator(args)
    crop = codec.num_frames(round(args.crop_seconds * codec.sampling_rate)) * codec.hop_length
    data, held_out = open_audio(args, accelerator, codec.sampling_rate, crop)
    repository = find_repository(args) if args.push_to_hub and accelerator.is_main_process else ""
    sizes, mel = window_sizes(codec.sampling_rate), make_mel(codec.sampling_rate)

    def compute_loss(network, batch, generators):
        sound, _ = network(batch["clean"], return_dict=False)
        return codec_loss(sound, batch["clean"], sizes, args.waveform_weight)

    def generate(network, step: int) -> dict[str, float]:
        values, pairs = measure(network, held_out, mel.to(accelerator.device))
        if args.num_validation_samples:
            show(pairs[: args.num_validation_samples], mel.cpu(), folder / "samples", step, accelerator.trackers)
        return values

    rate = codec.sampling_rate / codec.hop_length
    bits = rate * codec.num_codebooks * math.log2(codec.codebook_size)
    recordings = data.train.read.recordings
    accelerator.print(
        f"{codec.num_parameters():,} parameters, {rate:g} frames of {codec.num_codebooks} x"
        f" {codec.codebook_size} codes a second ({bits:.0f} bit/s)"
    )
    accelerator.print(
        f"{len(recordings)} recordings of {len(recordings.samples) / codec.sampling_rate:.0f} s to train on,"
        f" {len(held_out) if held_out else 0} held out"
    )
    about = {
        "codec": settings_of(codec),
        "recordings": hashlib.sha256("/".join(recordings.names).encode()).hexdigest(),
    }
    measured = with_metrics(args, accelerator, generate, lambda: whole(held_out, codec.sampling_rate))
    try:
        trained = train(args, accelerator, codec, data, compute_loss, measured, about, "codec")
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder / ".audio")
    if accelerator.is_main_process:
        with writing(folder, CONTINUE):
            write_codec(args, accelerator, folder, trained, about, repository)
        print(f"the codec is in {folder}")
        if args.push_to_hub:
            publish_folder(folder, repository)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
