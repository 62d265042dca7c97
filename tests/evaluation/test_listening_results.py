"""Answers of listeners: known means come back, intervals hold what they promise, and bad listeners are found."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from tonefield import evaluate
from tonefield.command_line import UserError
from tonefield.evaluation.listening_results import (
    analyse_listening,
    crossed_bootstrap,
    interval,
    krippendorff_alpha,
    table,
)


NAN = float("nan")
MEANS = {"fine": 3.8, "rough": 2.4, "real": 4.3, "anchor": 1.6}


def make_key(kind="mos", sounds=12, repeats=3, test="t1"):
    """A key as `listening-test` writes it, for sounds that nobody needs to hear."""
    names = {f"{system}-{n}": {"system": system, "file": f"{n}.wav"} for system in MEANS for n in range(sounds)}
    if kind == "mos":
        items = {f"i-{name}": {"sounds": [name]} for name in names}
    else:
        pairs = [("fine", "rough"), ("fine", "real"), ("rough", "real"), ("real", "anchor")]
        items = {f"i-{a}-{b}-{n}": {"sounds": [f"{a}-{n}", f"{b}-{n}"]} for a, b in pairs for n in range(sounds)}
    for item in list(items)[:repeats]:
        items[f"again-{item}"] = {**items[item], "repeat_of": item}
    return {
        "format": "tonefield listening key",
        "version": 1,
        "test": test,
        "type": kind,
        "title": "Birds",
        "question": "How good?",
        "systems": {"fine": "a", "rough": "b"},
        "reference": {"real": "c"},
        "matched": True,
        "sounds": names,
        "items": items,
    }


def sheet(key, listener, rate):
    """Answers of one listener; `rate` gets the systems that an item is of, and the item."""
    answers = []
    for name, item in key["items"].items():
        systems = [key["sounds"][sound]["system"] for sound in item["sounds"]]
        answers.append(
            {"item": name, "sounds": item["sounds"], "rating": rate(systems, item), "plays": 1, "seconds": 2.0}
        )
    about = {"format": "tonefield listening result", "version": 1, "test": key["test"], "type": key["type"]}
    return {**about, "listener": listener, "complete": True, "answers": answers}


def raters(key, count, seed):
    """Listeners with tastes of their own, sounds of their own quality; over all of them the expectation is `MEANS`."""
    rng = np.random.default_rng(seed)
    quality = {sound: rng.uniform(-0.3, 0.3) for sound in key["sounds"]}
    sheets = []
    for listener in range(count):
        taste = rng.uniform(-0.2, 0.2)

        def rate(systems, item, taste=taste):
            wanted = MEANS[systems[0]] + taste + quality[item["sounds"][0]]
            return int(np.floor(wanted + rng.uniform()))  # rounded up as often as it needs to be right on average

        sheets.append(sheet(key, f"listener {listener}", rate))
    return sheets


def test_simulated_raters_give_back_their_means():
    key = make_key(sounds=20)
    results = analyse_listening(raters(key, 24, 0), key)
    assert [row["system"] for row in results["systems"]] == ["real", "fine", "rough", "anchor"]
    for row in results["systems"]:
        low, high = row["interval"]
        assert low < MEANS[row["system"]] < high and high - low < 0.5
        assert row["mean"] == pytest.approx(MEANS[row["system"]], abs=0.15)
        assert row["ratings"] == 24 * 20 == sum(row[f"rated_{n}"] for n in range(1, 6))
    (row,) = results["differences"]
    assert row["systems"] == ["fine", "rough"]
    assert row["interval"][0] < 1.4 < row["interval"][1]
    # Tastes are in both means and fall out of their difference, which drawing listeners together keeps.
    assert 0 < results["alpha"] < 1
    assert results["repeats"]["answers"] == 72 and 0.4 < results["repeats"]["same"] < 0.9
    assert results["repeats"]["within_one"] == 1


def coverage(simulations):
    """How often the interval of a mean, and of a difference between two systems, holds the truth."""
    rng = np.random.default_rng(7)
    held = np.zeros(2)
    for _ in range(simulations):
        taste, quality = rng.normal(0, 0.4, (14, 1)), rng.normal(0, 0.3, (1, 16))
        ratings = [
            mean + taste + quality + rng.normal(0, 0.3, (14, 1)) + rng.normal(0, 0.6, (14, 16)) for mean in (3, 4)
        ]
        for values in ratings:
            values[rng.random(values.shape) < 0.05] = NAN
        means = crossed_bootstrap(ratings, True, 400, rng)
        for index, (resampled, truth) in enumerate(((means[:, 0], 3), (means[:, 1] - means[:, 0], 1))):
            low, high = interval(resampled)
            held[index] += low <= truth <= high
    return held / simulations


def test_intervals_hold_the_truth():
    assert (np.abs(coverage(200) - 0.95) < 0.045).all()


@pytest.mark.slow
def test_intervals_hold_the_truth_in_95_of_100_cases():
    assert (np.abs(coverage(1000) - 0.95) < 0.02).all()


def test_bootstrap_is_that_of_its_definition():
    """Against resampling written out: drawn listeners by drawn sounds, repeated rows and columns and all."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 4))
    values[1, 2] = NAN
    plain = [np.nanmean(values[np.ix_(rng.integers(0, 5, 5), rng.integers(0, 4, 4))]) for _ in range(20000)]
    ours = crossed_bootstrap([values], False, 20000, rng)[:, 0]
    assert ours.mean() == pytest.approx(np.mean(plain), abs=0.02)
    assert ours.std() == pytest.approx(np.std(plain), rel=0.03)
    np.testing.assert_allclose(interval(ours), np.quantile(plain, [0.025, 0.975]), atol=0.04)


def test_listeners_and_sounds_are_drawn_together():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 9))
    shifted = crossed_bootstrap([values, values + 1], True, 200, rng)
    np.testing.assert_allclose(shifted[:, 1] - shifted[:, 0], 1)
    apart = crossed_bootstrap([values, values + 1], False, 200, rng)
    assert (apart[:, 1] - apart[:, 0]).std() > 0.05
    of_one = np.repeat(rng.normal(size=(6, 1)), 9, 1)  # the listener is all that matters
    apart = crossed_bootstrap([of_one, of_one + 1], False, 200, rng)
    np.testing.assert_allclose(apart[:, 1] - apart[:, 0], 1)


def test_alpha_of_the_published_example():
    """Krippendorff (2011), section C: 4 observers, 12 units, missing values."""
    _ = NAN
    values = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ])  # fmt: skip
    assert krippendorff_alpha(values, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(values, "interval") == pytest.approx(0.849, abs=5e-4)


def test_alpha_at_its_ends():
    rng = np.random.default_rng(0)
    units = rng.integers(1, 6, 40).astype(float)
    assert krippendorff_alpha(np.stack([units] * 3), "interval") == 1
    assert abs(krippendorff_alpha(rng.integers(1, 6, (20, 400)).astype(float), "interval")) < 0.01
    assert krippendorff_alpha(np.full((3, 4), 2.0), "nominal") is None
    assert krippendorff_alpha(np.array([[1.0, NAN], [NAN, 2.0]]), "nominal") is None


def test_win_rates():
    key = make_key("pairs", sounds=10)
    better = {"real": 3, "fine": 2, "rough": 1, "anchor": 0}

    def rate(systems, item):  # the better one, but for two sounds of the first kind of pair
        wrong = set(systems) == {"fine", "rough"} and item["sounds"][0] in ("fine-0", "fine-1")
        return 1 + int((better[systems[0]] < better[systems[1]]) != wrong)

    sheets = [sheet(key, f"listener {n}", rate) for n in range(3)]
    for answer in sheets[1]["answers"]:  # who met the sides the other way round
        answer["sounds"] = answer["sounds"][::-1]
        answer["rating"] = 3 - answer["rating"]
    results = analyse_listening(sheets, key)
    rows = {(row["system"], row["against"]): row for row in results["pairs"]}
    assert {pair: row["wins"] for pair, row in rows.items()} == {
        ("fine", "rough"): 24, ("fine", "real"): 0, ("rough", "real"): 0, ("real", "anchor"): 30,
    }  # fmt: skip
    row = rows["fine", "rough"]
    assert row["win_rate"] == 0.8 and row["judgements"] == 30
    # Wilson's interval: the rates from which 24 lies 1.96 standard deviations away.
    for rate_at_end in row["binomial_interval"]:
        assert abs(24 - 30 * rate_at_end) / (30 * rate_at_end * (1 - rate_at_end)) ** 0.5 == pytest.approx(
            1.96, abs=1e-3
        )
    assert row["p_value"] == pytest.approx(2 * binom.sf(23, 30, 0.5))
    # All listeners agree, so what is uncertain is the sounds: ten, not thirty.
    assert row["interval"][1] - row["interval"][0] > row["binomial_interval"][1] - row["binomial_interval"][0]
    assert results["alpha"] == 1 and results["repeats"] == {"answers": 9, "same": 1.0}
    assert ["fine", "over", "rough", "80%"] in [line.split()[:4] for line in table(results).splitlines()]


def test_listeners_who_do_not_listen_are_left_out_and_named():
    key = make_key()
    good = raters(key, 6, 1)
    bad = [
        sheet(key, "deaf", lambda systems, item: 5 if systems == ["anchor"] else 3),
        sheet(key, "bored", lambda systems, item: 4),
    ]
    results = analyse_listening(good + bad, key)
    reasons = {person["listener"]: person["excluded"] for person in results["listeners"] if person["excluded"]}
    assert reasons == {
        "deaf": "rated anchors 5.0 and real recordings 3.0", "bored": "rated anchors 4.0 and real recordings 4.0",
    }  # fmt: skip
    assert results["kept"] == 6 and results["systems"] == analyse_listening(good, key)["systems"]
    assert "Left out: deaf, rated anchors 5.0" in table(results)
    everyone = analyse_listening(good + bad, key, keep_all=True)
    assert everyone["kept"] == 8 and everyone["systems"][0]["ratings"] == 8 * 12
    fewer = analyse_listening(good, key, exclude=["listener 2"])
    assert fewer["kept"] == 5 and fewer["listeners"][2]["excluded"] == "excluded by you"

    pairs = make_key("pairs", repeats=0)
    fault = {
        "deaf": lambda systems, item: 2,
        "wrong": lambda systems, item: 1 + (systems[0] == "real"),
        "lazy": lambda systems, item: 1,
    }
    sheets = [
        sheet(pairs, "good", lambda systems, item: 1 + (systems != ["real", "anchor"] and "-7" in item["sounds"][0]))
    ]
    results = analyse_listening(sheets + [sheet(pairs, name, rate) for name, rate in fault.items()], pairs)
    assert {p["listener"]: p["excluded"] for p in results["listeners"]} == {
        "deaf": "preferred anchors to real recordings in 12 of 12 pairs",
        "wrong": "preferred anchors to real recordings in 12 of 12 pairs",
        "lazy": "always chose A",
        "good": None,
    }
    without = {**make_key(), "reference": None}
    with pytest.raises(ValueError, match=r"^Nobody is left of 1 listeners \(bored: rated everything 4\)\.$"):
        analyse_listening(bad[1:], without)


def test_anchors_do_not_count_for_agreement():
    """Everybody can tell them, so with them any listeners would agree."""
    key = make_key()
    rng = np.random.default_rng(0)
    sheets = [
        sheet(key, f"listener {n}", lambda systems, item: 1 if systems == ["anchor"] else int(rng.integers(2, 6)))
        for n in range(8)
    ]
    assert abs(analyse_listening(sheets, key, keep_all=True)["alpha"]) < 0.1


def test_parts_and_second_files_of_a_listener():
    key = make_key()
    sheets = raters(key, 3, 2)
    part = {**sheets[0], "complete": False, "answers": sheets[0]["answers"][:5]}
    results = analyse_listening([part, *sheets, part], key)
    assert results["answers"] == 3 * 48 and len(results["notes"]) == 2
    assert "sent answers more than once" in results["notes"][0]
    sheets[0] = part
    sheets[1]["answers"][0]["rating"] = None  # could not be played
    results = analyse_listening(sheets, key)
    assert results["answers"] == 5 + 47 + 48
    assert [person["complete"] for person in results["listeners"]] == [False, True, True]
    assert "Could not be played: 1 items" in table(results)
    assert "one listener" in analyse_listening(sheets[2:], key)["notes"][0]


def test_other_sounds_for_each_system_make_differences_less_certain():
    key = make_key(sounds=8)
    sheets = raters(key, 12, 3)
    quality = {n: (n % 4) for n in range(8)}  # the same of both systems, so it falls out where sounds go together
    for one in sheets:
        for answer in one["answers"]:
            system, n = answer["sounds"][0].split("-")
            if system in ("fine", "rough"):
                answer["rating"] = 1 + quality[int(n)] + (system == "fine")
    together = analyse_listening(sheets, key, keep_all=True)["differences"][0]
    apart = analyse_listening(sheets, {**key, "matched": False}, keep_all=True)["differences"][0]
    assert together["interval"] == [1, 1] == [together["difference"]] * 2
    assert apart["interval"][1] - apart["interval"][0] > 1


def write(folder, name, content):
    path = Path(folder, name)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def run(*argv):
    evaluate.main(evaluate.parse_args(["listening-results", *argv]))


def test_command(tmp_path, capsys):
    key = make_key()
    files = [write(tmp_path, f"{n}.json", sheet) for n, sheet in enumerate(raters(key, 4, 5))]
    out = str(tmp_path / "out" / "results.json")
    run(*files, "--key", write(tmp_path, "key.json", key), "--out", out, "--exclude", "listener 3", "--seed", "3")
    text = capsys.readouterr().out
    assert "192 answers" not in text and "144 answers of 3 listeners" in text
    assert "Left out: listener 3, excluded by you" in text
    results = json.loads(Path(out).read_text())
    lines = Path(out).with_suffix(".csv").read_text().splitlines()
    assert lines[0].startswith("system,mean,interval_low,interval_high,ratings,sounds,rated_1")
    assert lines[1].split(",")[:2] == [results["systems"][0]["system"], str(results["systems"][0]["mean"])]
    run(*files, "--key", str(tmp_path / "key.json"), "--keep_all", "--bootstrap", "100")
    assert "192 answers of 4 listeners" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path):
    key = make_key()
    answers = raters(key, 1, 0)[0]
    good, right = write(tmp_path, "good.json", answers), write(tmp_path, "key.json", key)
    foreign = write(tmp_path, "foreign.json", {**answers["answers"][0]})
    twice = {**answers, "answers": answers["answers"][:1] * 2}
    wild = {**answers, "answers": [{**answers["answers"][0], "rating": 6}]}
    unknown = {**answers, "answers": [{**answers["answers"][0], "item": "x"}]}
    swapped = {**answers, "answers": [{**answers["answers"][0], "sounds": ["x"]}]}
    for files, other, message in [
        (["nowhere.json"], right, r"^nowhere.json cannot be read \(No such file or directory\)\.$"),
        ([write(tmp_path, "broken.json", "{")], right, r"broken.json cannot be read \(not JSON: .*\)\.$"),
        ([write(tmp_path, "list.json", [])], right, r"list.json is not a listener's answers\.$"),
        ([foreign], right, r"foreign.json is not a listener's answers\.$"),
        ([good], good, r"good.json is not a key that .* wrote, but a tonefield listening result\.$"),
        (
            [good],
            write(tmp_path, "other.json", make_key(test="t2")),
            r"good.json belongs to test t1, the key to test t2",
        ),
        ([right], right, r"key.json is not a listener's answers, but a tonefield listening key\.$"),
        ([write(tmp_path, "old.json", {**answers, "version": 0})], right, r"is of version 0, which this tonefield"),
        ([write(tmp_path, "twice.json", twice)], right, r"twice.json is damaged: "),
        ([write(tmp_path, "wild.json", wild)], right, r"wild.json is damaged: .*\"rating\": 6"),
        ([write(tmp_path, "unknown.json", unknown)], right, r"unknown.json is damaged: "),
        ([write(tmp_path, "swapped.json", swapped)], right, r"swapped.json is damaged: "),
        ([write(tmp_path, "none.json", {**answers, "answers": 3})], right, r"none.json is damaged: "),
        ([good], right + " --exclude y", r"^There is no listener 'y' to exclude; there are listener 0\.$"),
        ([good], right + " --bootstrap 9", r"^--bootstrap 9 is too few"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            run(*files, "--key", *other.split())
        assert "\n" not in str(error.value)
