"""Makes sound with any pipeline of tonefield.

    python inference.py                                            # the model that comes with the repository
    python inference.py --model outputs/drums --class_label kick --class_label snare --num_samples 8
    python inference.py --model USER/NAME --prompt "rain on a tin roof" --seconds 20 --seed 7
    python inference.py --model USER/NAME --audio song.wav --inpaint 2.5:4
    python inference.py --model USER/NAME --audio song.wav --continue_to 60
    python inference.py --model USER/NAME --interpolate 3 8 6      # six sounds, from that of seed 3 to that of 8
    accelerate launch --num_processes 4 inference.py --model USER/NAME --prompt lines.txt --num_samples 500

--output_dir receives the sounds, a picture of each, `overview.png` with all of them side by side, and
`manifest.jsonl`: a line for each sound with its file, seed, prompt and settings. A run that was stopped goes on when
it is started again. Any line can be made again, bit for bit on the same machine:

    python inference.py --again sounds/drums-1f2e3d4c/manifest.jsonl --lines 3 7
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tonefield.command_line import UserError, first_line, make_parser, parse, run
from tonefield.files import claim, write_sound, write_text, writing
from tonefield.pipelines.from_flags import (
    DEFAULT_MODEL,
    SOLVERS,
    Sound,
    load_model,
    make_batch,
    make_call,
    make_path,
    model_fingerprint,
    refuse,
    sampling_rate_of,
)


# What does not decide how a sound sounds.
PLACES = ("config", "output_dir", "again", "lines")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", metavar="NAME", help="a pipeline: folder or Hub id (default: one that comes along)")
    parser.add_argument("--output_dir", metavar="DIR", help="(default: sounds/<model>-<hash of the settings>)")

    what = parser.add_argument_group("what to make")
    what.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; or a .txt file with one on each line"
    )
    what.add_argument("--negative_prompt", metavar="TEXT", help="what guidance leads away from")
    what.add_argument("--class_label", action="append", metavar="NAME", help="name or number; may be repeated")
    what.add_argument(
        "--num_samples", type=int, metavar="N",
        help="sounds in all; prompts and classes take turns (default: one for each prompt or class, otherwise 4)",
    )  # fmt: skip
    what.add_argument("--seconds", type=float, metavar="S", help="length of each (default: the model's)")
    what.add_argument("--loop", action="store_true", default=None, help="sounds that can be repeated without a click")
    what.add_argument("--seed", type=int, default=0, help="of the first sound; the next has the next (default: 0)")

    given = parser.add_argument_group("from a sound")
    given.add_argument("--audio", metavar="FILE", help="the sound to vary, to mend or to continue")
    given.add_argument("--strength", type=float, help="how far to vary it: 0 returns it, 1 does not heed it")
    given.add_argument(
        "--inpaint", action="append", metavar="START:END", type=span, help="seconds to make anew; may be repeated"
    )
    given.add_argument("--continue_to", type=float, metavar="S", help="continue it until it is so many seconds long")
    given.add_argument(
        "--interpolate", nargs=3, metavar=("A", "B", "N"), help="N sounds from A to B: seeds, or sound files"
    )

    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, metavar="N", help="steps from noise to sound (default: the pipeline's)")
    how.add_argument(
        "--solver", "--scheduler", metavar="NAME",
        help=f"what makes the steps: for diffusion {', '.join(SOLVERS)}; for Poisson flow dpmsolver++, heun, euler,"
        " rk45; for tokens event, analytic, euler, remdm, confidence (default: as the model was saved)",
    )  # fmt: skip
    how.add_argument(
        "--guidance_scale", type=float, metavar="W",
        help="1 follows prompt or class as it was learnt, more exaggerates it (default: 3 with one, otherwise 1)",
    )  # fmt: skip
    how.add_argument("--temperature", type=float, help="factor on the noise; of tokens, on the logits (default: 1)")
    how.add_argument("--eta", type=float, help="noise in each step of ddim, 0 to 1 (default: 0)")
    how.add_argument("--vocoder", metavar="NAME", help="a vocoder, folder or Hub id, in the place of the model's")
    how.add_argument("--n_iter", type=int, metavar="N", help="iterations of Griffin-Lim, where there is no vocoder")
    how.add_argument("--batch_size", type=int, default=16, metavar="N", help="sounds at once (default: %(default)s)")

    out = parser.add_argument_group("files")
    out.add_argument("--output_format", choices=("wav", "flac", "ogg", "mp3"), default="wav", help="(default: wav)")
    out.add_argument("--loudness", type=float, metavar="LUFS", help="bring every sound to this loudness, such as -16")
    out.add_argument("--fade", type=float, metavar="S", help="fade in and out over so many seconds")
    out.add_argument("--again", metavar="MANIFEST", help="make sounds of a manifest.jsonl again")
    out.add_argument("--lines", nargs="+", type=int, metavar="K", help="which ones, from 0 on (default: all)")
    args = parse(parser, argv)
    check(parser, args)
    return args


def span(text: str) -> tuple[float, float]:
    """START:END in seconds."""
    try:
        start, end = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form START:END, in seconds, such as 0.5:1.25"
        ) from None
    if not 0 <= start < end:
        raise argparse.ArgumentTypeError(f"{text!r} does not end after it starts")
    return start, end


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What can be told to be wrong before any model is there."""
    for name in ("strength", "inpaint", "continue_to"):
        if getattr(args, name) is not None and args.audio is None:
            parser.error(f"--{name} wants a sound to start from: --audio FILE")
    if args.audio and args.strength is None and args.inpaint is None and args.continue_to is None:
        parser.error("--audio wants to know what to do with it: --strength, --inpaint or --continue_to")
    if args.continue_to is not None and args.seconds is not None:
        parser.error("--continue_to and --seconds both say how long the sound shall be: leave one out")
    if args.interpolate:
        if args.audio or args.num_samples:
            parser.error("--interpolate A B N knows its sounds and their number: leave --audio and --num_samples out")
        if not args.interpolate[2].isdigit() or int(args.interpolate[2]) < 2:
            parser.error(f"--interpolate A B N wants a number of sounds from 2 on, not {args.interpolate[2]!r}")
    if args.loop and args.fade:
        parser.error("--fade silences the seam that --loop makes inaudible: leave one out")
    for name in ("num_samples", "batch_size", "steps", "n_iter", "seconds", "continue_to"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} is {value}: it must be positive")
    if args.fade is not None and args.fade < 0:
        parser.error(f"--fade is {args.fade}: it must not be negative")
    if args.lines is not None and not args.again:
        parser.error("--lines belongs to --again MANIFEST")


# ----- what is to be made


def read_prompts(given: list[str]) -> list[str]:
    """Texts, and the lines of the .txt files among them."""
    prompts = []
    for text in given:
        if not text.endswith(".txt"):
            prompts.append(text)
            continue
        try:
            lines = [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt {text} cannot be read: {first_line(error)}") from None
        prompts += [line for line in lines if line]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError(f"--prompt {' '.join(given)!r} holds no text.")
    return prompts


def plan(pipe, args: argparse.Namespace) -> list[Sound]:
    """All sounds of the run. Prompts and classes take turns; the seeds count up."""
    prompts, labels = [None], [None]
    if args.prompt:
        if pipe.components.get("text_encoder") is None:
            refuse(pipe, "prompt", "its model reads no text")
        prompts = read_prompts(args.prompt)
    num_classes = getattr(pipe, "num_classes", 0)
    if args.class_label:
        if not num_classes:
            refuse(pipe, "class_label", "its model knows no classes")
        names = pipe.config.label2id or {}
        for label in args.class_label:
            if label not in names and not (label.isdigit() and int(label) < num_classes):
                known = ", ".join(names) if names else f"0 to {num_classes - 1}"
                raise UserError(f"--class_label {label} is unknown: the model's classes are {known}.")
        labels = args.class_label
    elif num_classes and not args.interpolate and not args.audio:
        labels = list(pipe.config.label2id or map(str, range(num_classes)))
    if args.interpolate:
        if len(prompts) > 1 or len(labels) > 1:
            raise UserError("--interpolate A B N goes one way: give one prompt or class at most.")
        count = int(args.interpolate[2])
    else:
        told = max(len(prompts), len(labels))
        count = args.num_samples or (4 if told == 1 and prompts == labels == [None] else told)
    return [
        Sound(index, args.seed + index, prompts[index % len(prompts)], labels[index % len(labels)])
        for index in range(count)
    ]


def batches_of(args: argparse.Namespace, sounds: list[Sound]) -> Iterator[list[Sound]]:
    size = len(sounds) if args.interpolate else args.batch_size
    for start in range(0, len(sounds), size):
        yield sounds[start : start + size]


# ----- files


def finish(waveform, rate: int, args: argparse.Namespace):
    """A waveform at the loudness that is wanted, faded in and out."""
    import numpy as np

    from tonefield.data.loudness import gain_to

    if not np.isfinite(waveform).all():
        raise UserError("The model makes numbers that are not finite: its weights are damaged, or its settings.")
    if args.loudness is not None:
        waveform = waveform * gain_to(args.loudness, waveform, rate)
    count = min(round((args.fade or 0) * rate), len(waveform) // 2)
    if count:
        ramp = np.sin(np.linspace(0, np.pi / 2, count, dtype=np.float32)) ** 2
        waveform = np.concatenate([waveform[:count] * ramp, waveform[count:-count], waveform[-count:] * ramp[::-1]])
    return waveform.astype(np.float32)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides how the sounds sound, so far as flags do."""
    settings = {name: value for name, value in vars(args).items() if value is not None and name not in PLACES}
    files = [args.audio, *(args.interpolate or [])[:2], *(text for text in args.prompt or [] if text.endswith(".txt"))]
    for name in files:
        if name and Path(name).is_file():
            settings.setdefault("files", {})[name] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    return json.loads(json.dumps(settings))  # as it is read again: lists, no tuples


def read_lines(file: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"There is no file {file}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no manifest: {first_line(error)}") from None


def lines_so_far(folder: Path, common: dict) -> dict[int, dict]:
    """What earlier starts of the same run have finished, by index."""
    done = {}
    for file in [*folder.glob("manifest.jsonl"), *folder.glob("manifest.part-*.jsonl")]:
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = dict(json.loads(text))
                sound, index = folder / line["file_name"], line["index"]
            except (ValueError, TypeError, KeyError):
                continue  # empty, or cut off when the run was stopped
            if {name: line.get(name) for name in common} != common:
                raise UserError(f"{folder} holds sounds of another run: choose another --output_dir.")
            if sound.is_file() and sound.with_suffix(".png").is_file():
                done[index] = line
    return done


def flags_of(settings: dict[str, Any]) -> list[str]:
    """The flags that a manifest's settings stand for."""
    flags = []
    for name, value in settings.items():
        if name == "interpolate" and isinstance(value, list):
            flags += ["--interpolate", *map(str, value)]
            continue
        for one in value if isinstance(value, list) else [value]:
            text = ":".join(map(str, one)) if isinstance(one, list) else str(one)
            flags.append(f"--{name}" if one is True else f"--{name}={text}")
    return flags


def restore(args: argparse.Namespace) -> tuple[argparse.Namespace, list[dict]]:
    """The settings of a manifest as flags, and those of its lines that are wanted."""
    defaults = parse_args([])
    for name, value in vars(args).items():
        if name not in PLACES and value != getattr(defaults, name):
            raise UserError(f"--again repeats the settings of {args.again}: leave --{name} out.")
    lines = read_lines(Path(args.again))
    if not lines:
        raise UserError(f"{args.again} has no lines.")
    wanted = range(len(lines)) if args.lines is None else args.lines
    for number in wanted:
        if not 0 <= number < len(lines):
            raise UserError(f"--lines {number}: {args.again} has the lines 0 to {len(lines) - 1}.")
    kinds = {"settings": dict, "fingerprint": str, "index": int, "sha256": str}
    for number in {0, *wanted}:
        for name, kind in kinds.items():
            if not isinstance(lines[number], dict) or not isinstance(lines[number].get(name), kind):
                raise UserError(f"{args.again} is no manifest: its line {number} has no {name}.")
    settings = dict(lines[0]["settings"])
    files = settings.pop("files", {})
    for name in settings:
        if name not in vars(defaults) or name in PLACES:
            raise UserError(f"{args.again} is no manifest: it sets {name!r}.")
    again = parse_args(flags_of(settings))  # checked like flags that somebody types
    again.output_dir = args.output_dir or f"{Path(args.again).parent}-again"
    if settings_of(again).get("files", {}) != files:
        raise UserError(f"A file that {args.again} was made with has changed or is gone: {', '.join(files)}.")
    return again, [lines[number] for number in wanted]


# ----- the run


def main(args: argparse.Namespace) -> None:
    wanted: list[dict] | None = None
    if args.again:
        args, wanted = restore(args)

    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from tqdm import tqdm

    from tonefield.data.pictures import contact_sheet, save_spectrogram

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as the scripts that train
    pipe = load_model(args)
    sounds = plan(pipe, args)
    call = make_call(pipe, args, sounds)
    settings = settings_of(args)
    name = args.model or str(DEFAULT_MODEL)
    common = {"model": name if not os.path.exists(name) else Path(name).resolve().name,
              "fingerprint": model_fingerprint(pipe), "settings": settings}  # fmt: skip
    if wanted and wanted[0]["fingerprint"] != common["fingerprint"]:
        raise UserError(
            f"The model {name} has the fingerprint {common['fingerprint']}, the manifest's {wanted[0]['fingerprint']}."
        )
    for line in wanted or []:
        if not 0 <= line["index"] < len(sounds):
            raise UserError(f"The manifest's sound {line['index']} is none of the {len(sounds)} that it tells of.")
    mark = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(args.output_dir or Path("sounds", f"{common['model'].split('/')[-1]}-{mark}"))
    folder.mkdir(parents=True, exist_ok=True)
    lock = claim(folder) if state.is_main_process else None
    done = lines_so_far(folder, common)
    missing = {sound.index for sound in sounds} - set(done)
    if wanted is not None:
        missing &= {line["index"] for line in wanted}
    # A batch is made as a whole even where a part of it is missing: then its sounds are the same bit for bit.
    batches = [batch for batch in batches_of(args, sounds) if any(sound.index in missing for sound in batch)]
    if done:
        print(f"{folder} has {len(done)} of {len(sounds)} sounds already")
    rate = sampling_rate_of(pipe)
    pipe.set_progress_bar_config(disable=len(batches) > 1 or not state.is_main_process, desc="steps")
    digits = max(3, len(str(len(sounds) - 1)))
    state.wait_for_everyone()  # all have read what there is before any of them writes
    bar = tqdm(total=len(missing), desc="sounds", disable=not state.is_main_process or len(batches) < 2)
    with (folder / f"manifest.part-{state.process_index}.jsonl").open("a", encoding="utf-8") as manifest, bar:
        manifest.write("\n")  # ends a line that was cut off
        for batch in batches[state.process_index :: state.num_processes]:
            try:
                waveforms: Any = (
                    make_path(pipe, args, call, batch) if args.interpolate else make_batch(pipe, call, batch)
                )
            except (ValueError, TypeError) as error:
                raise UserError(first_line(error)) from None
            for sound, waveform in zip(batch, waveforms, strict=True):
                if sound.index not in missing:
                    continue
                file = folder / f"{sound.index:0{digits}d}.{args.output_format}"
                finished = finish(waveform, rate, args)
                write_sound(file, finished, rate)
                checksum = hashlib.sha256(file.read_bytes()).hexdigest()
                line = {"file_name": file.name, "index": sound.index, "seed": sound.seed, "prompt": sound.prompt,
                        "class_label": sound.class_label, "sha256": checksum}  # fmt: skip
                with writing(folder):
                    save_spectrogram(finished, rate, file.with_suffix(".png"))
                    manifest.write(json.dumps(line | common) + "\n")
                    manifest.flush()
            bar.update(sum(sound.index in missing for sound in batch) * state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        done = lines_so_far(folder, common)
        write_text(folder / "manifest.jsonl", "".join(json.dumps(done[index]) + "\n" for index in sorted(done)))
        for part in folder.glob("manifest.part-*.jsonl"):
            part.unlink()
        titles = [sounds[index].title for index in sorted(done)]
        contact_sheet(
            [folder / Path(done[index]["file_name"]).with_suffix(".png") for index in sorted(done)],
            titles,
            folder / "overview.png",
        )
        print(f"{len(missing)} sounds in {folder}, all at a glance in {folder / 'overview.png'}")
        for line in wanted or []:
            same = done[line["index"]]["sha256"] == line["sha256"]
            print(f"{done[line['index']]['file_name']}: {'the same, bit for bit' if same else 'not the same bits'}")
    if lock is not None:
        lock.close()


if __name__ == "__main__":
    run(main, parse_args())
