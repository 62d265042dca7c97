"""The report as a page: it says what the numbers say, shows what the sounds are, and opens in a real browser."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from tonefield import evaluate
from tonefield.command_line import UserError
from tonefield.evaluation.metrics import run_metrics
from tonefield.evaluation.report import choose, histogram, number, short_names, spectrograms, ticks, write_report
from tonefield.evaluation.sets import AudioSet


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Generated sounds and recordings, one of each set silent and one broken."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, noise in (("made <up>", 0.1), ("takes", 0.0)):
        (root / name).mkdir()
        for take in range(12):
            time = np.arange(round((0.4 + 0.02 * take) * 8000)) / 8000
            sound = 0.3 * np.sin(2 * np.pi * (200 + 50 * take) * time) + noise * rng.normal(size=len(time))
            soundfile.write(root / name / f"take{take:02}.wav", sound * (take > 0), 8000)
        (root / name / "broken & lost.wav").write_bytes(b"no sound")
    return root / "made <up>", root / "takes"


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory):
    """What the command writes: the numbers and the page."""
    out = tmp_path_factory.mktemp("report") / "result.json"
    argv = ["--generated", folders[0], "--reference", folders[1], "--out", out, "--no_cache", "--curve"]
    evaluate.main(evaluate.parse_args([*map(str, argv), "--samples", "3"]))
    return json.loads(out.read_text()), out.with_suffix(".html")


def data_urls(page, kind):
    return [base64.b64decode(text) for text in re.findall(f'src="data:{kind};base64,([^"]*)"', page)]


def test_page_opens_plays_and_asks_for_nothing(browser, report):
    _, path = report
    for device in (
        dict(viewport=dict(width=1200, height=800)),
        dict(viewport=dict(width=390, height=700), is_mobile=True),
    ):
        page = browser.new_page(**device)
        requests, complaints = [], []
        page.on("request", lambda request, seen=requests: seen.append(request.url))
        page.on("console", lambda message, seen=complaints: seen.append(message.text))
        page.on("pageerror", lambda error, seen=complaints: seen.append(str(error)))
        page.goto(path.as_uri())
        assert page.locator("h1").text_content() == "made <up>"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("Array.from(document.images).every(image => image.complete && image.naturalWidth > 0)")
        first, second = page.locator(".sound button").nth(2), page.locator(".sound button").nth(3)
        first.click()
        page.locator(".sound.playing").wait_for()
        second.click()  # stops the first
        page.locator(".sound:nth-child(2).playing").wait_for()
        assert page.locator(".sound.playing").count() == 1
        page.wait_for_function("() => !document.querySelector('.playing')")  # to its end
        page.get_by_text("1 left out").first.click()
        assert page.get_by_text("broken & lost.wav").first.is_visible()
        page.close()
        assert not complaints
        assert all(url.startswith("data:") or url == path.as_uri() for url in requests)


def test_page_says_what_the_numbers_say(report, folders):
    numbers, path = report
    page = path.read_text()
    assert len(numbers["results"]) == 2
    for result in numbers["results"]:
        low, high = result["interval"]
        assert f"<b>{number(result['value'])}</b>" in page
        assert f"{number(low)} to {number(high)}" in page
    for sentence in {warning.partition(": ")[2] for warning in numbers["warnings"]}:
        shown = html.escape(sentence.replace(f"{folders[0].parent}/", ""))  # the sets by their short names
        assert page.count(f"<li>{shown}") == 1, sentence
    for about in (numbers["generated"], *numbers["references"]):
        assert about["fingerprint"] in page and about["rejects"] and about["silent"]
    assert page.count("broken &amp; lost.wav") >= 2 and "cannot be read as audio" in page
    assert "<up>" not in page and str(path.parent) not in page
    for curve in numbers["curves"]:
        for point in curve["points"]:
            assert f"<title>{point['n']} sounds: {number(point['value'])}</title>" in page


def test_sounds_are_those_of_the_sets(report, folders):
    _, path = report
    sounds = [soundfile.read(io.BytesIO(data)) for data in data_urls(path.read_text(), "audio/wav")]
    assert len(sounds) == 2 * 3
    for place, (sound, rate) in enumerate(sounds):  # row by row, the sets in turn
        original, _ = soundfile.read(folders[place % 2] / f"take{place // 2 * 4:02}.wav")
        assert rate == 8000
        np.testing.assert_allclose(sound, original, atol=1e-4)


def test_spectrogram_shows_frequency_upwards_and_time_to_the_right():
    rate = 16000
    time = np.arange(rate) / rate
    rising = np.where(time < 0.5, np.sin(2 * np.pi * 500 * time), 0.1 * np.sin(2 * np.pi * 4000 * time))
    pictures = [np.array(Image.open(io.BytesIO(data))) for data in spectrograms([rising, rising[: rate // 2]], rate)]
    assert pictures[0].shape[0] == 128 and 500 < pictures[0].shape[1] < 620
    assert pictures[1].shape[1] == pytest.approx(pictures[0].shape[1] / 2, rel=0.02)
    quarters = pictures[0][:, [pictures[0].shape[1] // 4, pictures[0].shape[1] * 3 // 4]].astype(float)
    # Slaney's mels: 200 / 3 Hz each up to 1 kHz, then 27 for a factor of 6.4; 128 bands between 130 corners.
    slaney = np.array([500 * 3 / 200, 15 + 27 * np.log(4) / np.log(6.4), 15 + 27 * np.log(8) / np.log(6.4)])
    rows = 127 - quarters.argmax(0)
    np.testing.assert_allclose(rows, slaney[:2] / slaney[2] * 129 - 1, atol=1)
    # 20 dB between the two tones, of 80 that go over 255 greys; the mel bands have unit area, which takes more away.
    loud, soft = quarters.max(0)
    assert loud == 255 and 255 - 255 * 40 / 80 < soft < 255 - 255 * 20 / 80 + 3


def test_silence_can_be_drawn():
    (picture,) = spectrograms([np.zeros(100)], 8000)
    assert Image.open(io.BytesIO(picture)).size[1] == 128


def test_samples_go_together_by_name_where_they_can():
    rng = np.random.default_rng(0)

    def named(names):
        one = AudioSet.of([rng.normal(size=100) * 0.1 for _ in names], 8000)
        one.samples = [
            type(sample)(**{**vars(sample), "name": name}) for sample, name in zip(one.samples, names, strict=True)
        ]
        return one

    sets = named("abcdefgh"), named("hgfedc"), named("xcdefg")
    chosen = [[sample.name for sample in samples] for samples in choose(sets, 3)]
    assert chosen == [["c", "d", "f"]] * 3
    apart = [[sample.name for sample in samples] for samples in choose([named("abcdef"), named("xyz")], 2)]
    assert apart == [["a", "d"], ["x", "y"]]
    assert [len(samples) for samples in choose([named("ab"), named("xyz")], 5)] == [2, 3]
    assert choose(sets, 0) == [[], [], []]


def test_whatever_a_metric_says_is_shown(folders, tmp_path):
    report, generated, references = run_metrics(
        [folders[1]], folders[0], ["kad"], ["mel"], evaluate.Options(curve=False, bootstrap=0)
    )
    tempi = list(np.random.default_rng(0).normal(120, 10, 50))
    report["results"] = [
        {"metric": "tempo", "reference": None, "embedding": None, "better": "", "value": None, "beats": tempi,
         "by_set": {"here": tempi, "there": tempi}, "worst": [{"file": "<a>", "value": 0.123456}],
         "by_class": {"one": 0.5}, "words": "so & so", "sizes": [10, 20]},
    ]  # fmt: skip
    report["warnings"] = []
    path = tmp_path / "report.html"
    write_report(report, generated, references, path, samples=0)
    page = path.read_text()
    assert page.count("<polygon") == 1 + 2 + 2 * 2  # beats, both sets, and lengths and peaks of two sets
    for text in ("<td>&lt;a&gt;</td><td>0.1235</td>", "<td>one</td><td>0.5</td>", "so &amp; so", "<dd>10, 20</dd>"):
        assert text in page
    assert "Listen and look" not in page and "keep in mind" not in page and "How many sounds" not in page


def test_histogram_is_of_shares():
    picture = histogram({"a": [0.0] * 3 + [1.0], "b": [0.0, float("nan")]}, "t")
    first, second = (
        np.array([point.split(",") for point in points.split()], float)
        for points in re.findall(r'<polygon class="s\d" points="([^"]*)"', picture)
    )
    assert first[:, 0].min() == 48 and first[:, 0].max() == 348
    heights = 172 - first[:, 1]
    assert heights.max() == pytest.approx(0.75 * 156) and (172 - second[:, 1]).max() == pytest.approx(156)
    assert heights[-2] == pytest.approx(0.25 * 156)
    alone = re.search(r'points="([^"]*)"', histogram({"a": [0.0] * 3 + [1.0]}, "t"))
    assert (
        alone and min(float(point.split(",")[1]) for point in alone[1].split()) == 172 - 156
    )  # as high as there is room
    assert "<polygon" in histogram({"a": [2.0, 2.0]}, "t") and histogram({"a": []}, "t") == ""


def test_numbers_and_names_as_people_write_them():
    values = [0.0, -30.0, 0.00012344, 123456.7, 12, 0.5, 1234.5678, 1e-12, float("inf"), "x", True]
    expected = ["0", "−30", "0.0001234", "123500", "12", "0.5", "1235", "1e-12", "inf", "x", "True"]
    assert [number(value) for value in values] == expected
    assert ticks(0, 95) == [0, 25, 50, 75] and ticks(-3, 3) == [-2, 0, 2] and ticks(1, 1) == [1]
    assert short_names(["/a/x", "/b/y"]) == {"/a/x": "x", "/b/y": "y"}
    assert short_names(["/a/x", "/b/x"]) == {"/a/x": "a/x", "/b/x": "b/x"}
    assert short_names(["x", "x"]) == {"x": "x"}


def test_numbers_and_page_cannot_be_one_file(folders, tmp_path):
    with pytest.raises(UserError, match=r"--out .*r.html would be both the numbers and the page: name .*r.json\.$"):
        evaluate.main(
            evaluate.parse_args(
                ["--generated", str(folders[0]), "--metrics", "kad", "--out", str(tmp_path / "r.html")]
            )
        )
