"""Writes a page on which people listen and judge: mean opinion scores, or blind pairs.

    python evaluate.py listening-test --systems ours=out/ours theirs=out/theirs --reference takes --out page
    python evaluate.py listening-test --type pairs --systems ours=out/ours theirs=out/theirs --out page

The page is one file, `page/index.html`, that needs no server and no network: send it to the listeners, or put it on
any web space. Each of them meets the sounds in an order of their own, at the same loudness and under names that say
nothing, and sends back a small file of answers. What is what stands in `page-key.json`, which stays with you. With
recordings to compare with (`--reference`), real sounds and some that are made dull on purpose are hidden among the
others, to calibrate the scale and to find listeners who do not listen. `evaluate.py listening-results` reads the
answers.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tonefield.command_line import UserError
from tonefield.files import write_text


PAGES = Path(__file__).parent / "pages"
QUESTIONS = {"mos": "How natural does this sound?", "pairs": "Which one sounds better?"}
ANCHOR = "anchor"
KEY_FORMAT = "tonefield listening key"
LARGE_PAGE = 25e6  # bytes; more is slow to load over a phone's network
SECONDS_TO_ANSWER = 4
PEAK = 0.99
FADE_SECONDS = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--systems",
        nargs="+",
        required=True,
        metavar="NAME=DIR",
        help="what to compare: folders of sounds, each named",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the page")
    parser.add_argument(
        "--key", metavar="FILE.json", help="where to write what is what (default: beside DIR, DIR-key.json)"
    )
    parser.add_argument(
        "--type", choices=["mos", "pairs"], default="mos",
        help="mos: each sound is rated from 1, bad, to 5, excellent (default); pairs: the better of two sounds",
    )  # fmt: skip
    parser.add_argument(
        "--reference", metavar="[NAME=]DIR", help="real recordings, to hide among the others, and to make anchors from"
    )
    parser.add_argument(
        "--items", type=int, default=20, metavar="N", help="sounds of each system, or pairs of each two (default: 20)"
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N",
        help="items that come twice, to see how constant a listener is (default: one in 15)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="longer sounds are cut to this length (default: 10)"
    )
    parser.add_argument(
        "--sample_rate", type=int, metavar="HZ",
        help="all sounds are resampled to this rate (default: the highest rate among them, at most 48000)",
    )  # fmt: skip
    parser.add_argument(
        "--loudness", type=float, default=-23.0, metavar="LUFS", help="of all sounds (default: -23, as in broadcasts)"
    )
    parser.add_argument("--title", default="Listening test", help="the page's title")
    parser.add_argument("--question", help='what to ask (default: "How natural does this sound?" or "Which one ...?")')
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sounds (default: 0)")


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    key_file = Path(args.key) if args.key else out.with_name(f"{out.name}-key.json")
    try:
        key = make_listening_test(
            dict(_named(argument) for argument in _unique(args.systems)),
            out,
            key_file,
            args.type,
            _named(args.reference, "reference") if args.reference else None,
            args.items,
            args.repeats,
            args.seconds,
            args.sample_rate,
            args.loudness,
            args.title,
            args.question,
            args.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    for line in key["notes"]:
        print(f"note: {line}")
    page, minutes = out / "index.html", max(1, round(key["minutes"]))
    what = "ratings" if args.type == "mos" else "pairs"
    print(
        f"{len(key['items'])} {what} of {key['sampling_rate']} Hz sounds, about {minutes} minute{'s' * (minutes > 1)}"
        f" for a listener: send {page} to them ({page.stat().st_size / 1e6:.1f} MB).\n"
        f"What is what stands in {key_file}: keep it to yourself. When answers have come back:\n"
        f"  python evaluate.py listening-results ANSWERS.json ... --key {key_file}"
    )


def _named(argument: str, default: str = "") -> tuple[str, str]:
    name, separator, folder = argument.partition("=")
    if not separator and default:
        return default, argument
    if not name or not folder:
        raise UserError(f"{argument!r} is not NAME=DIR, such as ours=out/samples.")
    return name, folder


def _unique(arguments: Sequence[str]) -> Sequence[str]:
    names = [_named(argument)[0] for argument in arguments]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--systems names two folders {name!r}: give each a name of its own.")
    return arguments


@dataclass
class Clip:
    """A sound as listeners get it."""

    system: str
    file: str
    samples: np.ndarray
    gain: float
    quiet: bool = False  # could not be brought to the loudness of the others


def make_listening_test(
    systems: Mapping[str, str | Path],
    out: str | Path,
    key_file: str | Path,
    kind: str = "mos",
    reference: tuple[str, str | Path] | None = None,
    items: int = 20,
    repeats: int | None = None,
    seconds: float = 10.0,
    sample_rate: int | None = None,
    loudness: float = -23.0,
    title: str = "Listening test",
    question: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Writes a page for a listening test into the folder `out`, and its key into `key_file`.

    Args:
        systems: The folder of each system to compare.
        kind: `"mos"`: every sound is rated from 1 to 5; `"pairs"`: the better of two sounds of the same name.
        reference: Name and folder of real recordings. They are judged like a system; dull copies of some of them
            (`anchor`) tell who listens.
        items: Sounds of each system, or pairs of each two systems.
        repeats: Items that come twice; `None`: one in 15.
        seconds: Longer sounds are cut to this length.
        sample_rate: Rate of all sounds; `None`: the highest among them, at most 48 kHz.
        loudness: In LUFS, of all sounds.

    Returns:
        The key: what each random name on the page stands for, and `notes` of what should be known.
    """
    if kind not in QUESTIONS:
        raise ValueError(f"kind is 'mos' or 'pairs', not {kind!r}.")
    if kind == "pairs" and len(systems) + (reference is not None) < 2:
        raise ValueError(f"Pairs need two systems, or one and a reference; there is only {', '.join(systems)}.")
    for name, value, least in (("items", items, 1), ("repeats", repeats, 0), ("sample_rate", sample_rate, 3000)):
        if value is not None and value < least:
            raise ValueError(f"{name} is at least {least}, not {value}.")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is a length above 0, not {seconds:g}.")
    if not -70 < loudness < 0:
        raise ValueError(f"loudness lies between -70 and 0 LUFS, not at {loudness:g}.")
    folders = [*systems.items(), *([reference] if reference else [])]
    taken = [name for name, _ in folders] + [ANCHOR]
    for name in taken:
        if taken.count(name) > 1:
            raise ValueError(f"The name {name!r} is taken: call the system something else.")
    out, key_file = Path(out), Path(key_file)
    if key_file.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"The key {key_file} must not lie in {out}, which listeners get.")
    for path in (out / "index.html", key_file):
        if path.exists():
            raise ValueError(f"{path} is there already: answers to it may come back, so it is not overwritten.")

    rng = np.random.default_rng(seed)
    sets = {name: _recordings(folder, name) for name, folder in folders}
    chosen, matched, notes = _choose(sets, list(systems), kind, items, rng)
    rate = sample_rate or min(48000, max(s.sampling_rate or 48000 for files in chosen.values() for s in files))
    clips = {
        name: [_clip(name, sample, rate, seconds, loudness) for sample in files] for name, files in chosen.items()
    }

    pairs = [(a, b) for index, a in enumerate(clips) for b in list(clips)[index + 1 :]]
    sets_of_clips = (
        [[clip] for files in clips.values() for clip in files]
        if kind == "mos"
        else [[first, second] for a, b in pairs for first, second in zip(clips[a], clips[b], strict=True)]
    )
    rare = max(1, round(len(sets_of_clips) / 15))
    cutoff = min(3500.0, rate / 8)
    if reference:
        real = clips[reference[0]]
        count = min(max(2, rare), len(real))
        dull = [
            (real[index], _dull(real[index], rate, cutoff, loudness)) for index in rng.permutation(len(real))[:count]
        ]
        sets_of_clips += [[anchor] if kind == "mos" else [clip, anchor] for clip, anchor in dull]
    repeats = min(rare if repeats is None else repeats, sum(map(len, chosen.values())))

    sounds: dict[str, Clip] = {}
    names: dict[int, str] = {}
    for clip in (clip for group in sets_of_clips for clip in group):
        if id(clip) not in names:
            names[id(clip)] = secrets.token_hex(8)
            sounds[names[id(clip)]] = clip
    test_items = {secrets.token_hex(8): {"sounds": [names[id(c)] for c in group]} for group in sets_of_clips}
    # Real recordings and anchors are easy to rate alike twice: what is under test tells more.
    open_items = [id_ for id_, item in test_items.items() if sounds[item["sounds"][0]].system in systems]
    for index in rng.permutation(len(open_items))[:repeats]:
        test_items[secrets.token_hex(8)] = test_items[open_items[index]] | {"repeat_of": open_items[index]}

    silent = [f"{clip.system}: {clip.file}" for clip in sounds.values() if not clip.samples.any()]
    quiet = [f"{clip.system}: {clip.file}" for clip in sounds.values() if clip.quiet]
    if silent:
        notes.append(f"silent, and left as they are: {_some(silent)}.")
    if quiet:
        notes.append(
            f"too peaky for {loudness:g} LUFS without clipping, so less loud than the others: {_some(quiet)}. A lower"
            " --loudness aligns them."
        )
    listened = sum(len(sounds[sound].samples) for item in test_items.values() for sound in item["sounds"]) / rate
    test = {
        "id": secrets.token_hex(8),
        "type": kind,
        "minutes": (listened + SECONDS_TO_ANSWER * len(test_items)) / 60,
        "noise": _wav(_noise(rate, loudness), rate),
        "sounds": {name: _wav(sounds[name].samples, rate) for name in sorted(sounds)},
        "items": [{"id": name, "sounds": sorted(test_items[name]["sounds"])} for name in sorted(test_items)],
    }
    page = _page(title, question or QUESTIONS[kind], test)
    if len(page) > LARGE_PAGE:
        notes.append(
            f"the page is {len(page) / 1e6:.0f} MB, slow to load on a phone: fewer --items, fewer --seconds or a lower"
            " --sample_rate make it smaller."
        )
    key = {
        "format": KEY_FORMAT,
        "version": 1,
        "test": test["id"],
        "type": kind,
        "title": title,
        "question": question or QUESTIONS[kind],
        "systems": {name: str(folder) for name, folder in systems.items()},
        "reference": {reference[0]: str(reference[1])} if reference else None,
        "anchor": {ANCHOR: f"the reference, low-passed at {cutoff:g} Hz"} if reference else None,
        "matched": matched,
        "sampling_rate": rate,
        "loudness": loudness,
        "seconds": seconds,
        "seed": seed,
        "minutes": test["minutes"],
        "rejects": {name: [list(reject) for reject in set_.rejects] for name, set_ in sets.items() if set_.rejects},
        "notes": notes,
        "sounds": {
            name: {"system": clip.system, "file": clip.file, "gain_db": round(20 * math.log10(clip.gain), 2)}
            for name, clip in sounds.items()
        },
        "items": test_items,
    }
    out.mkdir(parents=True, exist_ok=True)
    key_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(key_file, json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "index.html", page)
    return key


def _recordings(folder: str | Path, name: str):
    from tonefield.evaluation.sets import AudioSet

    return AudioSet.open(folder, flag=f"{name}:")


def _choose(sets, systems: Sequence[str], kind: str, items: int, rng: np.random.Generator):
    """The files of each set, whether those of all systems go together by name, and what should be known of it."""
    by_name = {
        name: {sample.name.rpartition(".")[0]: sample for sample in set_.samples} for name, set_ in sets.items()
    }
    notes = [
        f"{name}: files that cannot be used: {len(set_.rejects)}, first {set_.rejects[0][0]}, {set_.rejects[0][1]}."
        for name, set_ in sets.items()
        if set_.rejects
    ]
    together = list(by_name) if kind == "pairs" else list(systems)
    common = sorted(set.intersection(*(set(by_name[name]) for name in together)))
    count = min(items, *(len(by_name[name]) for name in together)) if len(together) > 1 else min(items, len(common))
    if kind == "pairs":
        if not common:
            raise ValueError(
                f"Pairs are files of the same name, and {', '.join(together)} have none in common"
                f" ({', '.join(min(by_name[name]) for name in together)})."
            )
        count = min(items, len(common))
    if count < items:
        notes.append(f"{count} sounds of each system, not {items}: there are no more.")
    matched = len(common) >= count
    if matched:
        stems = [common[index] for index in rng.permutation(len(common))[:count]]
        chosen = {name: [by_name[name][stem] for stem in stems] for name in together}
    else:
        notes.append("the systems' files have different names, so each is judged on other sounds; less is certain.")
        chosen = {name: _some_of(by_name[name], count, rng) for name in together}
    for name in set(sets) - set(together):  # real recordings, which need not go with what was generated
        same = matched and all(stem in by_name[name] for stem in stems)
        chosen[name] = [by_name[name][stem] for stem in stems] if same else _some_of(by_name[name], count, rng)
    return chosen, matched, notes


def _some_of(files: Mapping[str, Any], count: int, rng: np.random.Generator) -> list:
    names = sorted(files)
    return [files[names[index]] for index in rng.permutation(len(names))[:count]]


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _clip(system: str, sample, rate: int, seconds: float, loudness: float) -> Clip:
    """A recording at the length and loudness of all others."""
    from tonefield.evaluation.sets import read_sample

    sound = read_sample(sample, rate).astype(np.float64)
    longest = round(seconds * rate)
    if len(sound) > longest:
        sound = sound[:longest]
        fade = min(longest, round(FADE_SECONDS * rate))
        sound[longest - fade :] *= np.linspace(1, 0, fade)
    return _aligned(system, sample.name, sound, rate, loudness)


def _aligned(system: str, file: str, sound: np.ndarray, rate: int, loudness: float) -> Clip:
    """A sound at a loudness, as far as its peaks allow."""
    from tonefield.data.loudness import integrated_loudness

    measured = integrated_loudness([sound], rate)
    if math.isinf(measured):
        return Clip(system, file, np.zeros_like(sound), 1.0)
    gain, most = 10 ** ((loudness - measured) / 20), PEAK / np.abs(sound).max()
    return Clip(system, file, sound * min(gain, most), min(gain, most), gain > most)


def _dull(clip: Clip, rate: int, cutoff: float, loudness: float) -> Clip:
    from scipy.signal import butter, sosfiltfilt

    return _aligned(
        ANCHOR, clip.file, sosfiltfilt(butter(8, cutoff, fs=rate, output="sos"), clip.samples), rate, loudness
    )


def _noise(rate: int, loudness: float) -> np.ndarray:
    """Two seconds of pink noise, to set the volume by."""
    count = 2 * rate
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=count))
    frequencies = np.fft.rfftfreq(count, 1 / rate)
    noise = np.fft.irfft(spectrum * (frequencies > 60) / np.sqrt(np.maximum(frequencies, 60)), count)
    fade = round(0.2 * rate)
    noise[:fade] *= np.linspace(0, 1, fade)
    noise[-fade:] *= np.linspace(1, 0, fade)
    return _aligned("", "", noise, rate, loudness).samples


def _wav(samples: np.ndarray, rate: int) -> str:
    """A WAV file of 16 bits in base64: every browser plays it, and nothing in it tells where it comes from."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.round(samples * 32767).astype(np.int16), rate, format="WAV", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()


def _page(title: str, question: str, test: dict[str, Any]) -> str:
    parts = {
        "style": (PAGES / "listening_test.css").read_text(encoding="utf-8").strip(),
        "script": (PAGES / "listening_test.js").read_text(encoding="utf-8").strip(),
        "title": html.escape(title),
        "question": html.escape(question),
        "test": json.dumps(test, separators=(",", ":")),
    }
    template = (PAGES / "listening_test.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
