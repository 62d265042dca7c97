"""evaluate.py: what it prints, what it writes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import tonefield.evaluate as script
from tonefield.command_line import UserError
from tonefield.evaluation import AudioSet, evaluate, frechet_distance, load_embedding
from tonefield.evaluation.metrics import METRICS


ROOT = Path(__file__).resolve().parents[1]
RATE = 8000


def voices(count, seed, noise=0.0):
    """Harmonic sounds of half a second, with a bit of noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(RATE // 2) / RATE
    sounds = []
    for _ in range(count):
        pitch, formant = rng.uniform(90, 220), rng.uniform(300, 2500)
        harmonics = np.arange(1, 17)[:, None] * pitch
        sound = (np.exp(-(((harmonics - formant) / 300) ** 2)) * np.sin(2 * np.pi * harmonics * time)).sum(0)
        sound *= np.exp(-rng.uniform(1, 6) * time) * 0.3
        sounds.append((sound + (0.001 + noise) * rng.normal(size=len(time))).astype(np.float32))
    return sounds


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name, seed, count, noise in [("real", 0, 40, 0), ("held_out", 1, 30, 0), ("noisy", 2, 30, 0.05)]:
        (root / name).mkdir()
        for index, sound in enumerate(voices(count, seed, noise)):
            soundfile.write(root / name / f"{index:03d}.wav", sound, RATE, subtype="FLOAT")
    return root


def run(capsys, *flags):
    args = script.parse_args([*map(str, flags), "--no_cache", "--num_workers", "2"])
    script.main(args)
    return capsys.readouterr()


def values(report, **wanted):
    return [r["value"] for r in report["results"] if all(r[key] == value for key, value in wanted.items())]


def test_the_report(folders, tmp_path, capsys):
    out = tmp_path / "reports" / "report.json"
    printed = run(
        capsys, "--reference", folders / "real", folders / "held_out", "--generated", folders / "noisy",
        "--metrics", "fad", "fad_inf", "fad_per_clip", "kad", "kid", "--curve", "--out", out,
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert len(report["results"]) == 10 and len(report["curves"]) == 6
    mel = load_embedding("mel")
    real, noisy = (AudioSet.open(folders / name).embed(mel) for name in ("real", "noisy"))
    first = report["results"][0]
    assert first["metric"] == "fad" and first["embedding"] == "mel" and first["reference"] == str(folders / "real")
    assert first["value"] == pytest.approx(frechet_distance(real.stats, noisy.stats))
    assert first["clips"] == [40, 30] and first["rows"] == [40, 30] and first["dim"] == 96
    assert first["ranks"] == [39, 29] and first["floor"] > 0
    assert first["interval"][0] < first["value"] < first["interval"][1]
    assert "the generated set has 30 rows, which span only a part of the 96 dimensions" in first["warnings"]
    assert "fad mel" in printed.err and "span only a part" in printed.err
    assert report["embeddings"][0]["sampling_rate"] == 16000 and report["embeddings"][0]["resampler"] == "soxr HQ"
    assert report["generated"]["sampling_rates"] == {"8000": 30}
    assert report["settings"]["metrics"][0] == "fad" and report["settings"]["seed"] == 0
    for text in ("fad_per_clip", "95 % interval", "resampled to 16000 Hz by soxr HQ", "the report is in"):
        assert text in printed.out
    points = report["curves"][0]["points"]
    assert [point["n"] for point in points] == sorted({point["n"] for point in points}) and points[-1]["n"] == 30
    assert points[-1]["value"] == pytest.approx(first["value"])
    assert points[0]["value"] > points[-1]["value"]  # the bias of few clips


def test_noise_is_seen_and_two_halves_are_alike(folders):
    report = evaluate(folders / "real", folders / "held_out", ["fad", "kad", "kid", "fad_inf"])
    noisy = evaluate(folders / "real", folders / "noisy", ["fad", "kad", "kid", "fad_inf"])
    for one, other in zip(report["results"], noisy["results"], strict=True):
        assert one["value"] < other["value"]
    kad = report["results"][1]
    assert (
        kad["interval"][0] < 0 < kad["interval"][1] and not kad["warnings"] and noisy["results"][1]["interval"][0] > 0
    )
    assert any("not distinguishable from sampling noise" in w for w in report["warnings"])
    assert not any("not distinguishable" in w for w in noisy["warnings"])


def test_a_set_and_itself(folders):
    real = AudioSet.open(folders / "real")
    order = np.random.default_rng(0).permutation(40)
    report = evaluate(real, real.subset(order), ["fad", "kad", "kid"])
    assert abs(values(report, metric="fad")[0]) < 1e-6 and report["results"][0]["interval"][0] == 0
    alike = [r["metric"] for r in report["results"] if any("more alike" in w for w in r["warnings"])]
    assert alike == ["kad", "kid"] and max(r["interval"][1] for r in report["results"][1:]) < 0
    assert any(": 40 files are in" in warning for warning in report["warnings"])
    assert values(evaluate(real, real, ["fad"]))[0] == pytest.approx(0, abs=1e-9)


def test_sounds_get_worse_in_the_order_in_which_they_do():
    real = AudioSet.of(voices(60, 0), RATE, "real")
    sets = [
        voices(40, 1), voices(40, 1, 0.003), voices(40, 1, 0.03),
        [np.random.default_rng(i).normal(size=4000).astype(np.float32) * 0.1 for i in range(40)],
        [np.zeros(4000, np.float32)] * 40,
    ]  # fmt: skip
    reports = [evaluate(real, AudioSet.of(sounds, RATE), ["fad", "kad"], bootstrap=0) for sounds in sets]
    for metric in ("fad", "kad"):
        found = [values(report, metric=metric)[0] for report in reports]
        assert found[:4] == sorted(found[:4]) and found[4] > 10 * abs(found[0])
    backwards = [sound[::-1].copy() for sound in sets[0]]
    report = evaluate(real, AudioSet.of(backwards, RATE), ["fad", "kad"])
    assert values(report)[0] > 2 * values(reports[0])[0] and values(report)[1] > values(reports[0])[1] + 2
    assert any("40 files are silent" in warning for warning in reports[4]["warnings"])


def test_the_worst_clips_are_named(tmp_path):
    long = [np.concatenate(voices(6, seed)) for seed in range(8)]
    long[5] = long[5] + np.random.default_rng(0).normal(size=len(long[5])).astype(np.float32) * 0.03
    (tmp_path / "made").mkdir()
    for index, sound in enumerate([*long, long[0][:8000]]):
        soundfile.write(tmp_path / "made" / f"{index}.wav", sound, RATE)
    real = AudioSet.of([np.concatenate(voices(6, seed)) for seed in range(100, 140)], RATE)
    (result,) = evaluate(real, tmp_path / "made", ["fad_per_clip"])["results"]
    assert result["worst"][0]["file"] == "5.wav" == result["best"][-1]["file"]
    assert len(result["worst"]) == 8  # the ninth has one row
    assert result["value"] == pytest.approx(np.median([clip["value"] for clip in result["worst"]]))
    assert result["warnings"] == ["the clips are of different lengths: a rank says less of the shorter ones"]
    (result,) = evaluate(real, AudioSet.of(voices(4, 0), RATE), ["fad_per_clip"])["results"]
    assert result["value"] is None and "use longer clips" in result["warnings"][0]


@pytest.mark.slow
def test_digits_get_worse_in_the_order_in_which_they_do():
    folder = os.environ.get("TONEFIELD_FSDD")
    if not folder:
        pytest.skip("TONEFIELD_FSDD names no folder of spoken digits")
    rng = np.random.default_rng(0)
    files = sorted(Path(folder).rglob("*.wav"))
    sounds = [soundfile.read(files[index], dtype="float32")[0] for index in rng.permutation(len(files))[:900]]
    real, held_out = AudioSet.of(sounds[:600], RATE), sounds[600:]

    def noisy(sound, decibels):
        return (sound + rng.normal(size=len(sound)) * sound.std() * 10 ** (-decibels / 20)).astype(np.float32)

    worse = [held_out, *([noisy(sound, level) for sound in held_out] for level in (20, 10))]
    worse += [[noisy(sound, -60) / 1000 for sound in held_out], [np.zeros_like(sound) for sound in held_out]]
    backwards = [sound[::-1].copy() for sound in held_out]
    for metric in ("fad", "kad"):
        found = [values(evaluate(real, AudioSet.of(some, RATE), [metric]))[0] for some in [*worse, backwards]]
        assert found[:5] == sorted(found[:5]) and found[5] > 5 * abs(found[0])


def test_how_many_clips_it_takes():
    """The interval at n is that of new sets of n, and the first n that is narrow enough is named."""
    real, rng = AudioSet.of(voices(60, 0), RATE, "real"), np.random.default_rng(0)
    made = AudioSet.of(voices(120, 3, 0.02), RATE, "made")
    report = evaluate(real, made, ["kad"], curve=True, precision=0.2)
    (curve,) = report["curves"]
    halves = {point["n"]: (point["interval"][1] - point["interval"][0]) / 2 for point in curve["points"][:-1]}
    enough = [n for n, half in halves.items() if half <= 0.2 * curve["points"][-1]["value"]]
    assert curve["smallest_n"] == enough[0] and min(halves) == 10 and max(halves) == 60
    assert evaluate(real, made, ["kad"], curve=True, precision=1e-6)["curves"][0]["smallest_n"] is None
    spread = np.std([values(evaluate(real, made.subset(rng.permutation(120)[:10]), ["kad"]))[0] for _ in range(12)])
    assert 0.3 < halves[10] / (1.96 * spread) < 2.5


def test_files_that_cannot_be_used_are_told(folders, tmp_path, capsys):
    made = tmp_path / "made"
    made.mkdir()
    for index, sound in enumerate(voices(6, 5)):
        soundfile.write(made / f"{index}.wav", sound, 16000)
    soundfile.write(made / "silent.wav", np.zeros(9000), 16000)
    (made / "cut.wav").write_bytes((made / "0.wav").read_bytes()[:30])
    (made / "copy.wav").write_bytes((made / "1.wav").read_bytes())
    printed = run(capsys, "--reference", folders / "real", "--generated", made, "--out", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert [r["file"] for r in report["generated"]["rejects"]] == ["cut.wav"]
    assert report["generated"]["silent"] == ["silent.wav"] and report["generated"]["files"] == 8
    for text in ("1 files are left out, the first one cut.wav", "1 files are silent", "copies of one another",
                 "sampling rates of 16000 Hz"):  # fmt: skip
        assert text in printed.err


def test_the_cache_is_used_and_notices_changes(folders, tmp_path):
    flags = ["--reference", str(folders / "real"), "--generated", str(tmp_path / "made"), "--out", str(tmp_path / "r")]
    flags += ["--cache_dir", str(tmp_path / "cache"), "--metrics", "fad"]
    (tmp_path / "made").mkdir()

    def made(noise):
        for index, sound in enumerate(voices(10, 5, noise)):
            soundfile.write(tmp_path / "made" / f"{index}.wav", sound, RATE)
        script.main(script.parse_args(flags))
        return json.loads((tmp_path / "r").read_text())["results"][0]["value"]

    first = made(0)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 4 and made(0) == first and sorted((tmp_path / "cache").iterdir()) == kept
    assert made(0.1) > first and len(list((tmp_path / "cache").iterdir())) == 6


@pytest.mark.parametrize("flags, message", [
    (["--generated", "{a}"], "The metric fad compares with recordings: name them with --reference"),
    (["--generated", "{a}", "--reference", "nowhere"], "--reference nowhere does not exist"),
    (["--generated", "nowhere", "--reference", "{a}"], "--generated nowhere does not exist"),
    (["--generated", "{empty}", "--reference", "{a}"], "There are no recordings in"),
    (["--generated", "{a}", "--reference", "{a}", "--metrics", "fid"], "There is no metric 'fid'; there are fad,"),
    (["--generated", "{a}", "--reference", "{a}", "--embeddings", "x"], "There is no embedding 'x'; there are mel,"),
    (["--generated", "{a}", "--reference", "{a}", "--metrics", "kl"], "kl needs --classifier"),
    (["--generated", "{a}", "--metrics", "clap_score"], "clap_score needs --clap"),
    (["--generated", "{a}", "--metrics", "clap_score", "--clap", "x"], "needs a caption of every file, and 000.wav"),
    (["--generated", "{one}", "--reference", "{a}"], "fad mel to .*: .*two rows of each set, not 1"),
    (["--generated", "{one}", "--reference", "{a}", "--metrics", "kad"], "two clips of each set, not 1"),
    (["--generated", "{a}", "--reference", "{one}", "--metrics", "kad"], "needs two rows"),
    (["--generated", "{one}", "--reference", "{a}", "--metrics", "fad_inf"], "1 clips are too few"),
    (["--generated", "{a}", "--reference", "{a}", "--out", "{a}"], "--out .* is a folder"),
    (["--generated", "{a}", "--reference", "{a}", "--out", "{a}/000.wav/r.json"], "--out .* cannot be written|exists"),
    (["--generated", "{a}", "--reference", "{a}", "--device", "abacus"], "--device abacus cannot be used"),
])  # fmt: skip
def test_errors_in_one_line(folders, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    soundfile.write(tmp_path / "one" / "a.wav", voices(1, 0)[0], RATE)
    names = {"a": folders / "held_out", "empty": tmp_path / "empty", "one": tmp_path / "one"}
    args = script.parse_args([flag.format(**names) for flag in flags] + ["--no_cache"])
    with pytest.raises((UserError, OSError), match=message) as error:
        script.main(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, message", [
    ([], "the following arguments are required: --generated"),
    (["--generated", "a", "--batch_size", "0"], "--batch_size is at least 1, not 0"),
    (["--generated", "a", "--bootstrap", "-1"], "--bootstrap is at least 0, not -1"),
    (["--generated", "a", "--precision", "0"], "--precision must be positive"),
    (["--generated", "a", "--cache_dir", "b", "--no_cache"], "contradict each other"),
])  # fmt: skip
def test_flags_without_a_meaning(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        script.parse_args(flags)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_an_error_of_the_command_is_one_line_and_a_status(tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), "--generated", str(tmp_path / "x"), "--reference", "y"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"error: --generated {tmp_path / 'x'} does not exist.\n"


def test_every_metric_can_be_found():
    for metric in METRICS.values():
        assert callable(metric.load()) and metric.better in ("lower", "higher", "")


def test_batch_size_and_workers_do_not_change_the_answer(folders):
    reports = [
        evaluate(folders / "real", folders / "noisy", ["fad", "kad"], batch_size=size, num_workers=workers)
        for size, workers in [(1, 1), (7, 4)]
    ]
    assert values(reports[0]) == pytest.approx(values(reports[1]), rel=1e-5)


def test_two_recordings_give_a_report_without_intervals_of_kernel_distances(tmp_path, capsys):
    """Of two clips no standard error is known, and not a number has no place in JSON."""
    for name, count in (("few", 2), ("made", 3)):
        (tmp_path / name).mkdir()
        for index, sound in enumerate(voices(count, seed=count)):
            soundfile.write(tmp_path / name / f"{index}.wav", sound, RATE)
    argv = ["--reference", str(tmp_path / "few"), "--generated", str(tmp_path / "made"), "--metrics", "kad", "kid"]
    script.main(script.parse_args([*argv, "--no_cache", "--out", str(tmp_path / "report.json")]))
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [result["interval"] for result in results] == [None, None]
    assert all(np.isfinite(result["value"]) for result in results)
