"""The report of an evaluation as a page: numbers with their intervals, plots, and sounds to see and hear.

The page is one file that asks for nothing else. It is made of the dictionary that [`evaluate`] returns, and shows
whatever metrics put there: numbers and texts in a list; a list of many numbers, or a dictionary of such lists, as a
histogram; a list of dictionaries as a table.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tonefield.files import write_text


if TYPE_CHECKING:
    from tonefield.evaluation.sets import AudioSet, Sample

PAGES = Path(__file__).parent / "pages"
SHOWN_ELSEWHERE = {"metric", "reference", "embedding", "better", "value", "interval", "clips", "warnings"}
MANY = 20  # numbers; a longer list is drawn
RANGE_DB = 80  # of a spectrogram, below the loudest point of all
BANDS = 128
COLUMNS = 560  # of the longest spectrogram
BETTER = {"lower": "↓ lower is better", "higher": "↑ higher is better", "": ""}


def write_report(
    report: Mapping[str, Any],
    generated: "AudioSet",
    references: "Sequence[AudioSet]",
    path: str | Path,
    samples: int = 4,
    seconds: float = 10.0,
) -> None:
    """
    Writes a report as a page to read.

    Args:
        report: What [`evaluate`] returns.
        generated: The set that was judged.
        references: The sets it was compared with.
        samples: How many sounds of each set to show and play.
        seconds: Longer sounds are cut to this length.
    """
    sets = [generated, *references]
    names = short_names([one.name for one in sets])
    parts = {
        "style": (PAGES / "report.css").read_text(encoding="utf-8").strip(),
        "script": (PAGES / "report.js").read_text(encoding="utf-8").strip(),
        "title": _text(names[generated.name]),
        "lead": _lead(report, names),
        "warnings": _warnings(report["warnings"], names),
        "results": _results(report, names),
        "curves": _curves(report["curves"], names),
        "sounds": _sounds(sets, names, samples, seconds),
        "sets": _sets(report, sets, names),
        "settings": _settings(report),
    }
    template = (PAGES / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write_text(Path(path), page)


# ----- Words and numbers


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, as many as it takes to tell them apart."""
    unique = list(dict.fromkeys(names))
    for parts in range(1, 1 + max(len(Path(name).parts) for name in unique)):
        short = {name: "/".join(Path(name).parts[-parts:]) or name for name in unique}
        if len(set(short.values())) == len(unique):
            return short
    return {name: name for name in unique}


def number(value: Any) -> str:
    """A number as people write it: four digits, and no exponent where there is no need of one."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 3 - math.floor(math.log10(abs(value)))
    if not -3 <= digits <= 8:
        return f"{value:.3g}"
    text = f"{round(value, digits):.{max(digits, 0)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _text(text: Any) -> str:
    return html.escape(str(text))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; what follows the first column of words is set to the right."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _tag(name: str, names: Mapping[str, str]) -> str:
    place = list(names).index(name) % 5
    return f'<span class="tag s{place}" title="{_text(name)}">{_text(names[name])}</span>'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _lead(report: Mapping[str, Any], names: Mapping[str, str]) -> str:
    judged = report["generated"]
    others = ", ".join(_tag(one["name"], names) for one in report["references"])
    files = f"{judged['files']} sound{'s' * (judged['files'] != 1)}, {_duration(judged['seconds'])}"
    return f"{_tag(judged['name'], names)} {files}" + (f", compared with {others}" if others else "")


def _warnings(warnings: Sequence[str], names: Mapping[str, str]) -> str:
    if not warnings:
        return ""
    where: dict[str, list[str]] = {}  # each sentence once, with all that it holds of
    for warning in dict.fromkeys(warnings):
        for name, short in names.items():
            warning = warning.replace(name, short)
        about, separator, sentence = warning.partition(": ")
        where.setdefault(sentence if separator else about, []).extend([about] * bool(separator))
    lines = "".join(
        f"<li>{_text(sentence)} <small>{_text(', '.join(abouts))}</small></li>" for sentence, abouts in where.items()
    )
    count = f"{len(where)} thing{'s' * (len(where) > 1)} to keep in mind"
    return f'<details class="warnings" open><summary>{count}</summary><ul>{lines}</ul></details>'


# ----- Results


def _results(report: Mapping[str, Any], names: Mapping[str, str]) -> str:
    from tonefield.evaluation.metrics import METRICS

    rows, more = [], []
    for result in report["results"]:
        alike = [one for one in report["results"] if all(one[k] == result[k] for k in ("metric", "embedding"))]
        interval = result.get("interval")
        embedding = f"{_text(result['embedding'])} " if result["embedding"] else ""
        mark = ' <span class="mark" title="see the notes above">!</span>' if result.get("warnings") else ""
        rows.append([
            f"<b>{_text(result['metric'])}</b>{mark}<small>{embedding}{BETTER[result['better']]}</small>",
            _tag(result["reference"], names) if result["reference"] else "",
            f"<b>{number(result['value'])}</b>" if result.get("value") is not None else "–",
            f"{number(interval[0])} to {number(interval[1])}" if interval else "",
            _whisker(result, alike),
            " / ".join(map(str, result.get("clips", ()))),
        ])  # fmt: skip
        about = {name: value for name, value in result.items() if name not in SHOWN_ELSEWHERE and value is not None}
        if about:
            words = (result["metric"], result["embedding"], names.get(result["reference"]))
            title = " · ".join(_text(word) for word in words if word)
            more.append(f"<details><summary>{title}</summary>{_about(about)}</details>")
    header = ["metric", "reference", "value", "95 % interval", "", "clips"]
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    shown = _table([header[i] for i in used], [[row[i] for i in used] for row in rows], "results")
    metrics = dict.fromkeys(result["metric"] for result in report["results"])
    glossary = "".join(
        f"<dt>{_text(name)}</dt><dd>{_text(METRICS[name].help if name in METRICS else '')}</dd>" for name in metrics
    )
    return (
        f'{shown}<dl class="glossary">{glossary}</dl>'
        + (f'<div class="more"><h3>More about each</h3>{"".join(more)}</div>' if more else "")
    )  # fmt: skip


def _about(about: Mapping[str, Any]) -> str:
    """Whatever else a metric says."""
    lines, parts = [], []
    for name, value in about.items():
        title = _text(name.replace("_", " "))
        if _is_numbers(value):
            parts.append(histogram({"": value}, title))
        elif isinstance(value, Mapping) and value and all(map(_is_numbers, value.values())):
            parts.append(histogram(value, title))
        elif isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
            rows = [[_text(number(item)) for item in row.values()] for row in value]
            parts.append(f"<h4>{title}</h4>{_table([_text(key) for key in value[0]], rows)}")
        elif isinstance(value, Mapping):
            rows = [[_text(key), _text(number(item))] for key, item in value.items()]
            parts.append(f"<h4>{title}</h4>{_table(['', ''], rows)}")
        else:
            many = isinstance(value, Sequence) and not isinstance(value, str)
            lines.append((title, _text(", ".join(map(number, value)) if many else number(value))))
    return _list(lines) + "".join(parts)


def _is_numbers(value: Any) -> bool:
    many = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > MANY
    return many and all(isinstance(item, (int, float)) for item in value)


def _list(lines: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in lines)}</dl>" if lines else ""


# ----- Plots, in lines and text that take the page's colours


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two others: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [step * index for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _whisker(result: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> str:
    """A value and its interval on the scale of all results of this metric and embedding."""
    if result.get("value") is None or not result.get("interval"):
        return ""
    ends = [0.0] + [end for one in alike if one.get("interval") for end in (*one["interval"], one["value"])]
    low, high = min(ends), max(ends)
    place, left, right, zero = (
        4 + 112 * (x - low) / ((high - low) or 1) for x in (result["value"], *result["interval"], 0.0)
    )
    return (
        f'<svg class="whisker" viewBox="0 0 120 16" width="120" height="16" aria-hidden="true">'
        f'<path class="axis" d="M{zero:.1f} 1V15"/><path class="line" d="M{left:.1f} 8H{right:.1f}"/>'
        f'<circle cx="{place:.1f}" cy="8" r="3.5"/></svg>'
    )


def _frame(title: str, x: Sequence[tuple[float, str]], y: Sequence[tuple[float, str]], marks: str, label: str) -> str:
    """A plot of 360 by 210 whose field reaches from (48, 12) to (348, 172); ticks are (place, text)."""
    lines = "".join(f'<path class="grid" d="M48 {place:.1f}H348"/>' for place, _ in y)
    texts = "".join(f'<text x="42" y="{place + 4:.1f}" text-anchor="end">{text}</text>' for place, text in y)
    texts += "".join(f'<text x="{place:.1f}" y="188" text-anchor="middle">{text}</text>' for place, text in x)
    return (
        f'<figure class="plot"><figcaption>{title}</figcaption><svg viewBox="0 0 360 210" role="img">{lines}'
        f'<path class="axis" d="M48 172H348"/>{marks}{texts}<text x="198" y="206" text-anchor="middle">{label}</text>'
        "</svg></figure>"
    )


def histogram(groups: Mapping[str, Sequence[float]], title: str, label: str = "", colours: Sequence[int] = ()) -> str:
    """Shares of each group in common bins, as steps; `colours` are those of the groups, 0 to 4."""
    values = {name: np.asarray(group, float) for name, group in groups.items()}
    values = {name: group[np.isfinite(group)] for name, group in values.items()}
    every = np.concatenate(list(values.values()))
    if every.size == 0:
        return ""
    low, high = float(every.min()), float(every.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(round(2 * math.sqrt(max(map(len, values.values())))), 8, 30))
    edges = np.linspace(low, high, bins + 1)
    shares = {name: np.histogram(group, edges)[0] / max(1, len(group)) for name, group in values.items()}
    top = max(share.max() for share in shares.values())
    marks = ""
    for index, share in enumerate(shares.values()):
        x, y = np.repeat(48 + 300 * (edges - low) / (high - low), 2), 172 - 156 * share / top
        steps = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, [172, *np.repeat(y, 2), 172], strict=True))
        marks += f'<polygon class="s{colours[index] if colours else index % 5}" points="{steps}"/>'
    across = [(48 + 300 * (x - low) / (high - low), number(x)) for x in ticks(low, high, 5)]
    up = [(172 - 156 * y / top, f"{100 * y:.3g} %") for y in ticks(0, float(top), 3)]
    return _frame(title, across, up, marks, _text(label))


def _curves(curves: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    if not curves:
        return ""
    plots = "".join(_curve(curve, names) for curve in curves)
    return (
        "<section><h2>How many sounds does it take?</h2><p>Each metric of fewer sounds, with the 95 % interval of new"
        " sets of that size. The dashed line is the value of all.</p>"
        f'<div class="plots">{plots}</div></section>'
    )


def _curve(curve: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A metric against the number of sounds, which grows by factors."""
    points = curve["points"]
    banded = [point for point in points if point["interval"]]
    sizes = np.log([point["n"] for point in points])
    ends = [0.0, *(point["value"] for point in points), *(end for point in banded for end in point["interval"])]
    low, high = min(ends), max(ends)

    def across(n: float) -> float:
        return 48 + 300 * (math.log(n) - sizes[0]) / ((sizes[-1] - sizes[0]) or 1)

    def up(value: float) -> float:
        return 172 - 156 * (value - low) / ((high - low) or 1)

    marks = ""
    if banded:
        above = [f"{across(point['n']):.1f},{up(point['interval'][1]):.1f}" for point in banded]
        below = [f"{across(point['n']):.1f},{up(point['interval'][0]):.1f}" for point in reversed(banded)]
        marks += f'<polygon class="band" points="{" ".join(above + below)}"/>'
    marks += f'<path class="whole" d="M48 {up(points[-1]["value"]):.1f}H348"/>'
    if curve["smallest_n"]:
        x = across(curve["smallest_n"])
        marks += f'<path class="enough" d="M{x:.1f} 12V172"/>'
        marks += f'<text x="{min(x + 5, 310):.1f}" y="22">±{curve["precision"]:.0%}</text>'
    line = " ".join(f"{across(point['n']):.1f},{up(point['value']):.1f}" for point in points)
    marks += f'<polyline class="line" points="{line}"/>'
    marks += "".join(
        f'<circle cx="{across(point["n"]):.1f}" cy="{up(point["value"]):.1f}" r="3"><title>'
        f"{point['n']} sounds: {number(point['value'])}</title></circle>"
        for point in points
    )
    labels: list[tuple[float, str]] = []
    for point in reversed(points):  # from the whole set down, as far as there is room
        place = across(point["n"])
        if not labels or labels[-1][0] - place > 30:
            labels.append((place, str(point["n"])))
    words = " ".join(_text(word) for word in (curve["metric"], curve["embedding"]) if word)
    to = f" to {_tag(curve['reference'], names)}" if curve["reference"] else ""
    enough = (
        f"{curve['smallest_n']} sounds are enough for ±{curve['precision']:.0%}"
        if curve["smallest_n"]
        else f"more sounds are needed for ±{curve['precision']:.0%}"
    )
    heights = [(up(value), number(value)) for value in ticks(low, high)]
    return _frame(f"<b>{words}</b>{to}<small>{enough}</small>", labels, heights, marks, "sounds")


# ----- Sounds


def choose(sets: "Sequence[AudioSet]", count: int) -> "list[list[Sample]]":
    """Some sounds of each set, spread over all: those of the same names, where the sets have some in common."""
    by_name = [{sample.name: sample for sample in one.samples} for one in sets]
    common = [name for name in by_name[0] if all(name in samples for samples in by_name)]
    chosen = []
    for samples in by_name:
        names = common or list(samples)
        taken = min(count, len(names))
        chosen.append([samples[names[index * len(names) // taken]] for index in range(taken)])
    return chosen


def spectrograms(sounds: Sequence[np.ndarray], rate: int) -> list[bytes]:
    """Mel spectrograms as PNGs, all on one scale of time, frequency and level."""
    import torch
    from matplotlib import colormaps
    from PIL import Image

    from tonefield.models.mel_spectrogram import mel_filterbank

    longest = max(len(sound) for sound in sounds)
    hop = max(1, longest // COLUMNS)
    # A window of 32 ms; zeros make the spectrum so fine that even the lowest bands have lines of their own.
    window = torch.hann_window(max(hop, round(0.032 * rate)), dtype=torch.float64)
    n_fft = 2 ** math.ceil(math.log2(rate / 6))
    bank = mel_filterbank(rate, n_fft, BANDS, 0.0, rate / 2)
    levels = []
    for sound in sounds:
        padded = np.pad(sound.astype(np.float64), len(window) // 2)
        frames = torch.from_numpy(padded).unfold(-1, len(window), hop) * window
        levels.append(10 * torch.log10(torch.fft.rfft(frames, n_fft).abs().square() @ bank.T + 1e-30))
    ceiling = max(max(float(level.max()) for level in levels), -200.0)
    palette = (colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    pictures = []
    for level in levels:
        grey = ((level - ceiling) / RANGE_DB + 1).clamp(0, 1).mul(255).round().byte().numpy().T[::-1]
        picture = Image.fromarray(np.ascontiguousarray(grey), mode="L")
        picture.putpalette(palette.tobytes())
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        pictures.append(file.getvalue())
    return pictures


def _sounds(sets: "Sequence[AudioSet]", names: Mapping[str, str], count: int, seconds: float) -> str:
    """Spectrograms side by side, and players."""
    from tonefield.evaluation.sets import read_sample

    chosen = choose(sets, count)
    every = [sample for samples in chosen for sample in samples]
    if not every:
        return ""
    rate = min(48000, max(sample.sampling_rate or 48000 for sample in every))
    sounds = [read_sample(sample, rate)[: round(seconds * rate)] for sample in every]
    longest = max(map(len, sounds))
    figures, pictures = [], spectrograms(sounds, rate)
    owners = [one.name for one, samples in zip(sets, chosen, strict=True) for _ in samples]
    for sample, sound, picture, owner in zip(every, sounds, pictures, owners, strict=True):
        caption = f"{_tag(owner, names)} <span>{_text(sample.name)}</span> <small>{_duration(sample.seconds)}</small>"
        figures.append(
            f'<figure class="sound"><button type="button" aria-label="Play {_text(sample.name)} of'
            f' {_text(names[owner])}"><img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}"'
            f' style="width:{100 * len(sound) / longest:.2f}%"><i class="head"></i></button>'
            f'<figcaption>{caption}</figcaption><audio preload="none" src="data:audio/wav;base64,{_wav(sound, rate)}">'
            "</audio></figure>"
        )
    of_set = iter(figures)
    columns = [[next(of_set) for _ in samples] for samples in chosen]
    rows = "".join(f'<div class="row">{"".join(filter(None, row))}</div>' for row in zip_longest(*columns))
    cut = f" Sounds longer than {seconds:g} s are cut." if any(s.seconds > seconds for s in every) else ""
    return (
        "<section><h2>Listen and look</h2><p>Click a spectrogram to play it. All have one scale: up to"
        f" {number(rate / 2000)} kHz from bottom to top (mel), {_duration(longest / rate)} from left to right,"
        f" {RANGE_DB} dB from dark to bright.{cut}</p>{rows}</section>"
    )


def _wav(sound: np.ndarray, rate: int) -> str:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, sound.clip(-1, 1), rate, format="WAV", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()


# ----- Sets and settings


def _sets(report: Mapping[str, Any], sets: "Sequence[AudioSet]", names: Mapping[str, str]) -> str:
    rows, lists = [], []
    for about in (report["generated"], *report["references"]):
        rates = ", ".join(f"{rate} Hz ({count})" for rate, count in about["sampling_rates"].items())
        rows.append([
            _tag(about["name"], names), str(about["files"]), _duration(about["seconds"]), _text(rates),
            str(len(about["silent"])), str(len(about["rejects"])), f"<code>{_text(about['fingerprint'])}</code>",
        ])  # fmt: skip
        for what, files in (
            ("left out", [(reject["file"], reject["reason"]) for reject in about["rejects"]]),
            ("silent, which count like all", [(file, "") for file in about["silent"]]),
        ):
            if files:
                lines = [[_text(file), _text(reason)] for file, reason in files]
                lists.append(
                    f"<details><summary>{_tag(about['name'], names)} {len(files)} {what}</summary>"
                    f"{_table(['file', 'reason'] if what == 'left out' else ['file', ''], lines)}</details>"
                )
    header = ["set", "files", "length", "sampling rates", "silent", "left out", "fingerprint"]
    colours = [list(names).index(one.name) % 5 for one in sets]
    seconds = {f"{i}": [sample.seconds for sample in one.samples] for i, one in enumerate(sets)}
    peaks = {f"{i}": [20 * math.log10(max(s.peak, 1e-5)) for s in one.samples] for i, one in enumerate(sets)}
    plots = histogram(seconds, "<b>Length</b>", "s", colours) + histogram(
        peaks, "<b>Peak</b>", "dB of full scale", colours
    )
    return f'{_table(header, rows, "sets")}{"".join(lists)}<div class="plots">{plots}</div>'


def _settings(report: Mapping[str, Any]) -> str:
    lines = [("tonefield", _text(report["tonefield"]))]
    lines += [
        (_text(name), _text(json.dumps(value) if isinstance(value, (list, dict)) else value))
        for name, value in report["settings"].items()
        if value is not None
    ]
    embeddings = [
        [_text(one["name"]), f"{one['sampling_rate']} Hz", _text(one["resampler"]), str(one["dim"]),
         _text(one["windowing"]), f"<code>{_text(one['fingerprint'])}</code>"]
        for one in report["embeddings"]
    ]  # fmt: skip
    header = ["embedding", "reads", "resampled by", "numbers", "windows", "fingerprint"]
    return (_table(header, embeddings, "sets") if embeddings else "") + _list(lines)
