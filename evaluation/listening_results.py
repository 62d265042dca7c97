"""Reads what listeners judged on a page of `evaluate.py listening-test`: means or win rates, with intervals.

    python evaluate.py listening-results answers/*.json --key page-key.json --out results.json

Every interval holds 95 %. Those of means, and of differences of means, come from a bootstrap over listeners and over
sounds, so they speak of other listeners and other sounds, not only of those that were there. Listeners who rate the
dull anchors as high as real recordings, or everything alike, are left out and named (--keep_all: they are kept).
Krippendorff's alpha says how far listeners agree: 1 is perfectly, 0 as if by chance.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from tonefield.command_line import UserError, first_line
from tonefield.evaluation.listening_test import ANCHOR, KEY_FORMAT
from tonefield.files import write_text


RESULT_FORMAT = "tonefield listening result"
RATINGS = {"mos": range(1, 6), "pairs": range(1, 3)}
FEWEST_TO_JUDGE = 10  # answers; whoever gave fewer may well have rated all alike


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("answers", nargs="+", metavar="ANSWERS.json", help="the files that listeners sent back")
    parser.add_argument(
        "--key", required=True, metavar="FILE.json", help="what is what, as written with the listening test"
    )
    parser.add_argument("--out", metavar="FILE.json", help="where to write all numbers; a table goes into FILE.csv")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="LISTENER", help="listeners to leave out, by the start of their id"
    )
    parser.add_argument("--keep_all", action="store_true", help="leave nobody out for what they rated")
    parser.add_argument(
        "--bootstrap", type=int, default=2000, metavar="N", help="resamples for the intervals (default: 2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def main(args: argparse.Namespace) -> None:
    if args.bootstrap < 100:
        raise UserError(f"--bootstrap {args.bootstrap} is too few for an interval: at least 100.")
    key = _read(args.key, KEY_FORMAT, "a key that evaluate.py listening-test wrote")
    answers = [_read(path, RESULT_FORMAT, "a listener's answers") for path in args.answers]
    try:
        results = analyse_listening(answers, key, args.exclude, args.keep_all, args.bootstrap, args.seed, args.answers)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(table(results))
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        with out.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            rows = results["systems" if results["type"] == "mos" else "pairs"]
            writer = csv.DictWriter(file, list(_flat(rows[0])))
            writer.writeheader()
            writer.writerows(map(_flat, rows))
        print(f"All numbers are in {out}, the table in {out.with_suffix('.csv')}.")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Intervals as two columns."""
    flat = {}
    for name, value in row.items():
        flat |= {f"{name}_low": value[0], f"{name}_high": value[1]} if "interval" in name else {name: value}
    return flat


def _read(path: str, form: str, what: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {first_line(error)}"
        raise UserError(f"{path} cannot be read ({reason}).") from None
    if not isinstance(content, dict) or content.get("format") != form:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{path} is not {what}{f', but a {found}' if found else ''}.")
    if content.get("version") != 1:
        raise UserError(f"{path} is of version {content.get('version')}, which this tonefield does not know.")
    return content


# ----- Statistics


def crossed_bootstrap(
    ratings: Sequence[np.ndarray], matched: bool, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """
    Means of ratings under resampling, of listeners and of sounds at once (the pigeonhole bootstrap of Owen, 2007).

    Args:
        ratings: For each system an array (listeners, sounds), NaN where there is none.
        matched: Whether the columns of all systems go together, so that they are drawn together.

    Returns:
        Means (resamples, systems). Its spread is slightly larger than the truth, never smaller on average: what varies
        from one rating to the next counts three times, what varies between listeners and between sounds once.
    """
    listeners = ratings[0].shape[0]
    of_listeners = rng.multinomial(listeners, np.full(listeners, 1 / listeners), resamples).astype(float)
    means, of_sounds = [], np.zeros(0)
    for index, values in enumerate(ratings):
        if index == 0 or not matched:
            sounds = values.shape[1]
            of_sounds = rng.multinomial(sounds, np.full(sounds, 1 / sounds), resamples).astype(float)
        known = ~np.isnan(values)
        total = (of_listeners @ np.where(known, values, 0.0) * of_sounds).sum(1)
        with np.errstate(invalid="ignore"):  # a resample without any rating
            means.append(total / (of_listeners @ known * of_sounds).sum(1))
    return np.stack(means, 1)


def interval(resampled: np.ndarray) -> list[float]:
    """The middle 95 % of resampled values."""
    return [float(value) for value in np.nanquantile(resampled, [0.025, 0.975])]


def krippendorff_alpha(values: np.ndarray, level: str) -> float | None:
    """
    Agreement of raters, 1 minus observed over expected disagreement (Krippendorff, 2011).

    Args:
        values: An array (raters, units), NaN where a rater has not rated.
        level: `"interval"`: disagreement is a squared difference; `"nominal"`: it is being different.

    Returns:
        `None` where nobody disagrees because there is one value only, or no unit has two ratings.
    """
    values = values[:, (~np.isnan(values)).sum(0) > 1]
    known = ~np.isnan(values)
    if not known.any():
        return None
    kinds = np.unique(values[known])
    counts = np.stack([((values == kind) & known).sum(0) for kind in kinds]).astype(float)  # (kinds, units)
    pairs = counts @ (counts / (counts.sum(0) - 1)).T - np.diag((counts / (counts.sum(0) - 1)).sum(1))
    apart = (kinds[:, None] - kinds) ** 2 if level == "interval" else (kinds[:, None] != kinds).astype(float)
    margin = pairs.sum(1)
    expected = (margin[:, None] * margin * apart).sum() / (margin.sum() - 1)
    return float(1 - (pairs * apart).sum() / expected) if expected > 0 else None


# ----- From answers to tables


def analyse_listening(
    answers: Sequence[dict[str, Any]],
    key: dict[str, Any],
    exclude: Sequence[str] = (),
    keep_all: bool = False,
    bootstrap: int = 2000,
    seed: int = 0,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """
    What listeners judged in a listening test, as plain numbers.

    Args:
        answers: The contents of the files that listeners sent back.
        key: What [`make_listening_test`] returned or wrote.
        exclude: Listeners to leave out, by the start of their id.
        keep_all: Whether to keep listeners who rate anchors like recordings, or everything alike.
        bootstrap: Resamples for the intervals.
        names: What errors call the files.
    """
    kind, notes = key["type"], []
    sheets: dict[str, dict[str, Any]] = {}
    for index, sheet in enumerate(answers):
        name = names[index] if names else f"file {index + 1}"
        _check(sheet, key, name)
        listener = sheet["listener"]
        if listener in sheets:
            notes.append(f"{listener} sent answers more than once: the most complete ones count.")
        if listener not in sheets or len(sheet["answers"]) > len(sheets[listener]["answers"]):
            sheets[listener] = sheet
    for start in exclude:
        if not any(listener.startswith(start) for listener in sheets):
            raise ValueError(f"There is no listener {start!r} to exclude; there are {', '.join(sorted(sheets))}.")

    people = [_listener(sheet, key, exclude, keep_all) for _, sheet in sorted(sheets.items())]
    kept = [person for person in people if person["excluded"] is None and person["answers"]]
    if not kept:
        first = f"{people[0]['listener']}: {people[0]['excluded'] or 'no answers'}"
        raise ValueError(f"Nobody is left of {len(people)} listeners ({first}).")
    tables = {person["listener"]: _judgements(sheets[person["listener"]], key) for person in kept}
    rng = np.random.default_rng(seed)
    results = {
        "type": kind,
        "title": key["title"],
        "question": key["question"],
        "matched": key["matched"],
        "listeners": people,
        "kept": len(kept),
        "answers": sum(person["answers"] for person in kept),
    }
    if len(kept) == 1:
        notes.append("there is one listener: the intervals say nothing of other listeners.")
    results |= _opinions(tables, key, bootstrap, rng) if kind == "mos" else _preferences(tables, key, bootstrap, rng)
    return results | {"repeats": _repeats(kept, kind), "notes": notes}


def _check(sheet: dict[str, Any], key: dict[str, Any], name: str) -> None:
    if sheet.get("test") != key["test"]:
        raise ValueError(
            f"{name} belongs to test {sheet.get('test')}, the key to test {key['test']}: give its own key."
        )
    seen, damaged = set(), f"{name} is damaged: the page cannot have written"
    if not isinstance(sheet.get("answers"), list) or not isinstance(sheet.get("listener"), str):
        raise ValueError(f"{damaged} it without a listener or a list of answers.")
    for answer in sheet["answers"]:
        try:
            sounds = key["items"][answer["item"]]["sounds"]
            rated = answer["rating"] is None or answer["rating"] in RATINGS[key["type"]]
            whole = rated and sorted(answer["sounds"]) == sorted(sounds) and answer["seconds"] >= 0
        except (KeyError, TypeError):
            whole = False
        if not whole or answer["item"] in seen:
            raise ValueError(f"{damaged} the answer {json.dumps(answer)}.")
        seen.add(answer["item"])


def _value(answer: dict[str, Any], key: dict[str, Any]) -> float | None:
    """A rating, or whether the first sound of the key's order was chosen (1) or the second (0)."""
    if answer["rating"] is None or key["type"] == "mos":
        return answer["rating"]
    return float(answer["sounds"][answer["rating"] - 1] == key["items"][answer["item"]]["sounds"][0])


def _judgements(sheet: dict[str, Any], key: dict[str, Any]) -> dict[str, float]:
    """The value of each item that was judged; repeats serve another purpose."""
    values = {answer["item"]: _value(answer, key) for answer in sheet["answers"]}
    return {item: v for item, v in values.items() if v is not None and "repeat_of" not in key["items"][item]}


def _systems_of(item: str, key: dict[str, Any]) -> tuple[str, ...]:
    return tuple(key["sounds"][sound]["system"] for sound in key["items"][item]["sounds"])


def _listener(sheet: dict[str, Any], key: dict[str, Any], exclude: Sequence[str], keep_all: bool) -> dict[str, Any]:
    """What is to be known of one listener, and why they are left out, if they are."""
    values = {answer["item"]: _value(answer, key) for answer in sheet["answers"]}
    judged = _judgements(sheet, key)
    again = ((value, judged.get(key["items"][item].get("repeat_of"))) for item, value in values.items())
    twice = [abs(second - first) for second, first in again if second is not None and first is not None]
    reason = None
    if any(sheet["listener"].startswith(start) for start in exclude):
        reason = "excluded by you"
    elif not keep_all:
        reason = _fault(judged, sheet, key)
    return {
        "listener": sheet["listener"],
        "answers": len(judged),
        "complete": len(values) == len(key["items"]),
        "not_played": sum(value is None for value in values.values()),
        "minutes": sum(answer["seconds"] for answer in sheet["answers"]) / 60,
        "mean": float(np.mean(list(judged.values()))) if judged and key["type"] == "mos" else None,
        "repeat_differences": twice,
        "excluded": reason,
    }


def _fault(judged: dict[str, float], sheet: dict[str, Any], key: dict[str, Any]) -> str | None:
    """Why a listener cannot have listened."""
    reference = next(iter(key["reference"] or {}), None)
    anchors = [value for item, value in judged.items() if ANCHOR in _systems_of(item, key)]
    if key["type"] == "mos":
        real = [value for item, value in judged.items() if _systems_of(item, key) == (reference,)]
        if anchors and real and np.mean(anchors) >= np.mean(real):
            return f"rated anchors {np.mean(anchors):.1f} and real recordings {np.mean(real):.1f}"
        if len(judged) >= FEWEST_TO_JUDGE and len(set(judged.values())) == 1:
            return f"rated everything {next(iter(judged.values())):g}"
        return None
    if anchors and np.mean(anchors) <= 0.5:  # the reference is the first of such a pair
        return f"preferred anchors to real recordings in {anchors.count(0)} of {len(anchors)} pairs"
    sides = [answer["rating"] for answer in sheet["answers"] if answer["rating"]]
    if len(sides) >= FEWEST_TO_JUDGE and len(set(sides)) == 1:
        return f"always chose {'AB'[sides[0] - 1]}"
    return None


def _matrix(tables: dict[str, dict[str, float]], items: Sequence[str]) -> np.ndarray:
    return np.array([[table.get(item, np.nan) for item in items] for table in tables.values()])


def _opinions(tables: dict[str, dict[str, float]], key: dict[str, Any], bootstrap: int, rng) -> dict[str, Any]:
    """Mean opinion scores of systems, and the differences between them."""
    groups: dict[str, list[str]] = {}
    for item in key["items"]:
        if "repeat_of" not in key["items"][item]:
            groups.setdefault(_systems_of(item, key)[0], []).append(item)
    tested = list(key["systems"])
    ratings = {name: _matrix(tables, items) for name, items in groups.items()}
    ratings = {name: values for name, values in ratings.items() if not np.isnan(values).all()}
    tested = [name for name in tested if name in ratings]
    resampled = {}
    if tested:
        means = crossed_bootstrap([ratings[name] for name in tested], key["matched"], bootstrap, rng)
        resampled = {name: means[:, index] for index, name in enumerate(tested)}
    for name in ratings:
        if name not in resampled:
            resampled[name] = crossed_bootstrap([ratings[name]], False, bootstrap, rng)[:, 0]
    systems = [
        {
            "system": name,
            "mean": float(np.nanmean(values)),
            "interval": interval(resampled[name]),
            "ratings": int((~np.isnan(values)).sum()),
            "sounds": values.shape[1],
            **{f"rated_{rating}": int((values == rating).sum()) for rating in RATINGS["mos"]},
        }
        for name, values in ratings.items()
    ]
    mean = {row["system"]: row["mean"] for row in systems}
    differences = [
        {"systems": [a, b], "difference": mean[a] - mean[b], "interval": interval(resampled[a] - resampled[b])}
        for a, b in combinations(tested, 2)
    ]
    units = [item for name, items in groups.items() if name != ANCHOR for item in items]
    alpha = krippendorff_alpha(_matrix(tables, units), "interval")
    return {"systems": sorted(systems, key=lambda row: -row["mean"]), "differences": differences, "alpha": alpha}


def _preferences(tables: dict[str, dict[str, float]], key: dict[str, Any], bootstrap: int, rng) -> dict[str, Any]:
    """How often one system is preferred to another."""
    from scipy.stats import binomtest

    groups: dict[tuple[str, ...], list[str]] = {}
    for item in key["items"]:
        if "repeat_of" not in key["items"][item]:
            groups.setdefault(_systems_of(item, key), []).append(item)
    rows = []
    for (first, second), items in groups.items():
        values = _matrix(tables, items)
        known = values[~np.isnan(values)]
        if known.size:
            test = binomtest(int(known.sum()), known.size)
            binomial = test.proportion_ci(method="wilson")
            rows.append({
                "system": first,
                "against": second,
                "wins": int(known.sum()),
                "judgements": known.size,
                "win_rate": float(known.mean()),
                "interval": interval(crossed_bootstrap([values], False, bootstrap, rng)[:, 0]),
                "binomial_interval": [float(binomial.low), float(binomial.high)],
                "p_value": float(test.pvalue),
            })  # fmt: skip
    units = [item for names, items in groups.items() if ANCHOR not in names for item in items]
    return {"pairs": rows, "alpha": krippendorff_alpha(_matrix(tables, units), "nominal")}


def _repeats(kept: Sequence[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """How alike the same item is judged twice by the same listener."""
    apart = np.array([difference for person in kept for difference in person["repeat_differences"]])
    if not apart.size:
        return None
    result = {"answers": apart.size, "same": float((apart == 0).mean())}
    return result | ({"within_one": float((apart <= 1).mean())} if kind == "mos" else {})


# ----- For people


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    people = results["listeners"]
    lines = [f"{results['title']}: {results['question']}"]
    lines += [f"{results['answers']} answers of {results['kept']} listeners", ""]
    if results["type"] == "mos":
        rows = [["system", "mean", "95 % interval", "ratings", *map(str, RATINGS["mos"])]]
        for row in results["systems"]:
            low, high = row["interval"]
            shares = [f"{row[f'rated_{rating}'] / row['ratings']:.0%}" for rating in RATINGS["mos"]]
            rows.append(
                [row["system"], f"{row['mean']:.2f}", f"{low:.2f} to {high:.2f}", str(row["ratings"]), *shares]
            )
        lines += _lines(rows)
        if results["differences"]:
            rows = [["difference", "mean", "95 % interval"]]
            for row in results["differences"]:
                low, high = row["interval"]
                rows.append([" - ".join(row["systems"]), f"{row['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}"])
            lines += ["", *_lines(rows)]
    else:
        rows = [["pair", "win rate", "95 % interval", "binomial", "wins", "p"]]
        for row in results["pairs"]:
            low, high = row["interval"]
            least, most = row["binomial_interval"]
            rows.append([
                f"{row['system']} over {row['against']}", f"{row['win_rate']:.0%}", f"{low:.0%} to {high:.0%}",
                f"{least:.0%} to {most:.0%}", f"{row['wins']} of {row['judgements']}", f"{row['p_value']:.2g}",
            ])  # fmt: skip
        lines += _lines(rows)
        lines += ["", "The binomial interval and p take all judgements for independent; the other does not."]
    lines.append("")
    if results["alpha"] is not None:
        lines.append(f"Agreement of listeners (Krippendorff's alpha): {results['alpha']:.2f}")
    if repeats := results["repeats"]:
        within = f", {repeats['within_one']:.0%} within one step" if "within_one" in repeats else ""
        lines.append(f"Judged the same when heard again: {repeats['same']:.0%}{within} (of {repeats['answers']})")
    unplayed = sum(person["not_played"] for person in people)
    if unplayed:
        lines.append(f"Could not be played: {unplayed} items")
    lines += [f"Left out: {person['listener']}, {person['excluded']}" for person in people if person["excluded"]]
    lines += [f"note: {note}" for note in results["notes"]]
    return "\n".join(lines).rstrip()
