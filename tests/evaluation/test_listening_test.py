"""The page of a listening test: what it holds, and a person's way through it in a real browser."""

import base64
import io
import json
import re

import numpy as np
import pytest
import soundfile

from tonefield import evaluate
from tonefield.command_line import UserError
from tonefield.data.loudness import integrated_loudness
from tonefield.evaluation.listening_results import analyse_listening
from tonefield.evaluation.listening_test import make_listening_test


RATES = {"zebrafinch": 8000, "nightjar": 16000, "wagtail": 8000}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three systems with files of the same names, of different rates, levels and lengths."""
    root = tmp_path_factory.mktemp("aviary")
    rng = np.random.default_rng(0)
    for index, (name, rate) in enumerate(RATES.items()):
        (root / name).mkdir()
        for take in range(3):
            time = np.arange(round((0.15 + 0.02 * take + 0.01 * index) * rate)) / rate
            sound = np.sin(2 * np.pi * (300 + 100 * take) * time) + 0.5 * rng.normal(size=len(time))
            soundfile.write(root / name / f"lapwing_{take}.wav", 0.02 * 3**index * sound, rate)
    return {name: root / name for name in RATES}


def write(folders, tmp_path, kind="mos", reference="wagtail", **options):
    systems = {name: folder for name, folder in folders.items() if name != reference}
    real = (reference, folders[reference]) if reference else None
    key = make_listening_test(systems, tmp_path / "page", tmp_path / "key.json", kind, real, **options)
    assert json.loads((tmp_path / "key.json").read_text()) == key
    return key, (tmp_path / "page" / "index.html")


def data_of(page):
    """The data on a page."""
    return json.loads(re.search(r'<script type="application/json" id="test">(.*?)</script>', page.read_text())[1])


def sound_of(text):
    return soundfile.read(io.BytesIO(base64.b64decode(text)))


def system_of(key, item):
    return [key["sounds"][sound]["system"] for sound in key["items"][item]["sounds"]]


# ----- What is written


def test_page_says_nothing_of_systems_and_files(folders, tmp_path):
    for kind in ("mos", "pairs"):
        key, page = write(folders, tmp_path / kind, kind)
        assert [path.name for path in page.parent.iterdir()] == ["index.html"]
        text = page.read_text().lower()
        for name in (*RATES, "lapwing", "aviary", "anchor", "repeat_of", str(tmp_path).lower()):
            assert name not in text, name
        test = data_of(page)
        names = [*test["sounds"], *(item["id"] for item in test["items"])]
        assert set(names) == {*key["sounds"], *key["items"]}
        assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)
        assert names == sorted(test["sounds"]) + sorted(key["items"])  # the order says nothing either
        assert all(set(item) == {"id", "sounds"} for item in test["items"])
        assert all(item["sounds"] == sorted(item["sounds"]) for item in test["items"])


def test_names_and_order_are_new_for_every_test(folders, tmp_path):
    keys = [write(folders, tmp_path / str(run), seed=1)[0] for run in range(2)]
    assert not set(keys[0]["items"]) & set(keys[1]["items"])
    files = [[(clip["system"], clip["file"]) for clip in key["sounds"].values()] for key in keys]
    assert files[0] == files[1]  # what the seed decides
    for seed in range(6):
        key, _ = write(folders, tmp_path / f"seed {seed}", items=1, seed=seed)
        files.append([clip["file"] for clip in key["sounds"].values() if clip["system"] == "nightjar"])
    assert len(set(map(tuple, files[2:]))) == 3  # any of the files may be chosen


def test_sounds_are_alike_in_all_but_the_system(folders, tmp_path):
    key, page = write(folders, tmp_path, items=3, seconds=0.16, loudness=-25)
    for name, text in data_of(page)["sounds"].items():
        data = base64.b64decode(text)
        assert len(data) == 44 + 2 * len(sound_of(text)[0])  # a bare header: no tags
        sound, rate = sound_of(text)
        assert rate == key["sampling_rate"] == 16000
        assert len(sound) <= 0.16 * rate
        assert integrated_loudness([sound], rate) == pytest.approx(-25, abs=0.02), key["sounds"][name]
    noise, rate = sound_of(data_of(page)["noise"])
    assert integrated_loudness([noise], rate) == pytest.approx(-25, abs=0.02)
    assert not key["notes"]


def test_sound_is_that_of_its_file(folders, tmp_path):
    key, page = write(folders, tmp_path)
    sounds = data_of(page)["sounds"]
    for name, about in key["sounds"].items():
        if about["system"] == "nightjar":  # whose rate is the page's
            original, _ = soundfile.read(folders["nightjar"] / about["file"])
            np.testing.assert_allclose(
                sound_of(sounds[name])[0], original * 10 ** (about["gain_db"] / 20), atol=2e-4, rtol=2e-3
            )


def test_anchor_is_a_dull_copy_of_the_reference(folders, tmp_path):
    key, page = write(folders, tmp_path)
    sounds = data_of(page)["sounds"]
    energy = {}
    for name, about in key["sounds"].items():
        sound, rate = sound_of(sounds[name])
        spectrum = np.abs(np.fft.rfft(sound)) ** 2
        above = np.fft.rfftfreq(len(sound), 1 / rate) > 1.3 * 2000  # an eighth of the rate
        energy[about["system"], about["file"]] = spectrum[above].sum() / spectrum.sum()
    anchors = [file for system, file in energy if system == "anchor"]
    assert len(anchors) == 2
    for file in anchors:
        assert energy["anchor", file] < 1e-3 < 0.05 < energy["wagtail", file]


def test_items_of_opinion_scores(folders, tmp_path):
    key, _ = write(folders, tmp_path, items=2, repeats=3)
    systems = [system_of(key, item) for item in key["items"] if "repeat_of" not in key["items"][item]]
    assert sorted(map(tuple, systems)) == sorted([(name,) for name in [*RATES, "anchor"] for _ in range(2)])
    files = {name: {c["file"] for c in key["sounds"].values() if c["system"] == name} for name in RATES}
    assert key["matched"] and files["zebrafinch"] == files["nightjar"] == files["wagtail"]
    repeats = {name: item for name, item in key["items"].items() if "repeat_of" in item}
    assert len({item["repeat_of"] for item in repeats.values()}) == 3
    for item in repeats.values():
        assert item["sounds"] == key["items"][item["repeat_of"]]["sounds"]
        assert system_of(key, item["repeat_of"])[0] in ("zebrafinch", "nightjar")
    assert len(write(folders, tmp_path / "none", repeats=0)[0]["items"]) == 3 * 3 + 2


def test_items_of_pairs(folders, tmp_path):
    key, _ = write(folders, tmp_path, "pairs")
    items = {name: item for name, item in key["items"].items() if "repeat_of" not in item}
    pairs = sorted(tuple(system_of(key, item)) for item in items)
    expected = [("nightjar", "wagtail"), ("zebrafinch", "nightjar"), ("zebrafinch", "wagtail")]
    assert pairs == sorted(expected * 3 + [("wagtail", "anchor")] * 2)
    for item in items.values():
        assert len({key["sounds"][sound]["file"] for sound in item["sounds"]}) == 1
    assert len(key["items"]) == len(items) + 1


def test_files_of_other_names_are_judged_apart_and_it_is_said(folders, tmp_path):
    for take, file in enumerate(sorted(folders["nightjar"].iterdir())):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / f"{take}.wav").write_bytes(file.read_bytes())
    key, _ = write({**folders, "nightjar": tmp_path / "other"}, tmp_path / "out", items=2)
    assert not key["matched"]
    assert "different names" in key["notes"][0]


def test_what_cannot_be_aligned_or_read_is_said(folders, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    click = np.zeros(8000)
    click[4000] = 0.9
    soundfile.write(odd / "lapwing_0.wav", click, 8000)
    soundfile.write(odd / "lapwing_1.wav", np.zeros(2000), 8000)
    (odd / "lapwing_2.wav").write_bytes(b"no sound")
    key, page = write({**folders, "zebrafinch": odd}, tmp_path / "out")
    notes = "\n".join(key["notes"])
    assert "zebrafinch: files that cannot be used: 1, first lapwing_2.wav, cannot be read" in notes
    assert "silent, and left as they are: zebrafinch: lapwing_1.wav." in notes
    assert "too peaky for -23 LUFS without clipping, so less loud than the others: zebrafinch: lapwing_0.wav" in notes
    assert "2 sounds of each system, not 20" in notes
    assert key["rejects"]["zebrafinch"][0][0] == "lapwing_2.wav"
    sounds = data_of(page)["sounds"]
    (peaky,) = (
        name for name, c in key["sounds"].items() if (c["system"], c["file"]) == ("zebrafinch", "lapwing_0.wav")
    )
    assert sound_of(sounds[peaky])[0].max() == pytest.approx(0.99, abs=1e-4)


def test_noise_to_set_the_volume_by_is_pink(folders, tmp_path):
    noise, rate = sound_of(data_of(write(folders, tmp_path)[1])["noise"])
    power = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [power[100 * 2**n * len(noise) // rate : 200 * 2**n * len(noise) // rate].sum() for n in range(6)]
    assert max(octaves) / min(octaves) < 2  # white noise: 32


def test_large_pages_are_said_to_be_large(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tonefield.evaluation.listening_test.LARGE_PAGE", 1e5)
    assert any("slow to load on a phone" in note for note in write(folders, tmp_path)[0]["notes"])


def test_title_and_question_are_text(folders, tmp_path):
    _, page = write(folders, tmp_path, title="<b>{{test}} & co</b>", question='"quoted"?')
    assert "<h1>&lt;b&gt;{{test}} &amp; co&lt;/b&gt;</h1>" in page.read_text()
    assert '<h1 id="question" tabindex="-1">&quot;quoted&quot;?</h1>' in page.read_text()


def run(*argv):
    args = evaluate.parse_args(["listening-test", *map(str, argv)])
    evaluate.main(args)


def test_command(folders, tmp_path, capsys):
    systems = [f"a={folders['zebrafinch']}", f"b={folders['nightjar']}"]
    run("--systems", *systems, "--out", tmp_path / "page", "--sample_rate", 11025, "--question", "Which?")
    assert "7 ratings of 11025 Hz sounds, about 1 minute for a listener" in capsys.readouterr().out
    key = json.loads((tmp_path / "page-key.json").read_text())
    assert key["reference"] is None and key["anchor"] is None and key["question"] == "Which?"
    with pytest.raises(UserError, match=r"index.html is there already: answers to it may come back"):
        run("--systems", *systems, "--out", tmp_path / "page")
    run(
        "--systems", *systems, "--out", tmp_path / "2", "--key", tmp_path / "k.json", "--reference", folders["wagtail"]
    )
    assert json.loads((tmp_path / "k.json").read_text())["reference"] == {"reference": str(folders["wagtail"])}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--systems", "{nightjar}"], r"is not NAME=DIR, such as ours=out/samples\.$"),
        (["--systems", "a={nightjar}", "a={wagtail}"], r"names two folders 'a': give each a name of its own\.$"),
        (["--systems", "a=nowhere"], r"^a: nowhere does not exist\.$"),
        (["--systems", "anchor={nightjar}"], r"^The name 'anchor' is taken"),
        (["--systems", "a={nightjar}", "--reference", "a={wagtail}"], r"^The name 'a' is taken"),
        (["--systems", "a={nightjar}", "--type", "pairs"], r"^Pairs need two systems, .*; there is only a\.$"),
        (
            ["--systems", "a={nightjar}", "b={others}", "--type", "pairs"],
            r"a, b have none in common \(lapwing_0, owl\)",
        ),
        (["--systems", "a={nightjar}", "--items", "0"], r"^items is at least 1, not 0\.$"),
        (["--systems", "a={nightjar}", "--repeats", "-1"], r"^repeats is at least 0, not -1\.$"),
        (["--systems", "a={nightjar}", "--sample_rate", "100"], r"^sample_rate is at least 3000, not 100\.$"),
        (["--systems", "a={nightjar}", "--seconds", "0"], r"^seconds is a length above 0, not 0\.$"),
        (["--systems", "a={nightjar}", "--loudness", "3"], r"^loudness lies between -70 and 0 LUFS, not at 3\.$"),
        (["--systems", "a={nightjar}", "--key", "{out}/key.json"], r"must not lie in .*, which listeners get\.$"),
    ],
)
def test_errors_are_one_line(folders, tmp_path, argv, message):
    (tmp_path / "others").mkdir()
    soundfile.write(tmp_path / "others" / "owl.wav", np.ones(100) / 2, 8000)
    places = {**folders, "others": tmp_path / "others", "out": tmp_path / "page"}
    with pytest.raises(UserError, match=message) as error:
        run(*(argument.format(**places) for argument in argv), "--out", tmp_path / "page")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page").exists()


# ----- In a browser


class Visitor:
    """Someone with the page open. Whatever it asks for or complains about is kept."""

    def __init__(self, browser, path, **device):
        self.context = browser.new_context(**device)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.path = path
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()
        if exception[0] is None:
            assert not self.complaints
            foreign = [url for url in self.requests if not url.startswith(("blob:", "data:", self.path.as_uri()))]
            assert not foreign

    @property
    def kept(self):
        return self.page.evaluate(f"JSON.parse(localStorage['tonefield-listening-{data_of(self.path)['id']}'])")

    def order(self):
        """What this listener hears, item by item."""
        return self.page.evaluate(
            "listener => presentation(JSON.parse(document.getElementById('test').textContent).items, listener)",
            self.kept["listener"],
        )

    def heard(self):
        """Waits until the answers are enabled."""
        self.page.locator("#answers:enabled").wait_for()

    def save(self, tmp_path, click="click"):
        with self.page.expect_download() as download:
            getattr(self.page.locator("#save"), click)()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        return file


def test_by_keyboard_with_a_reload_in_the_middle(browser, folders, tmp_path, capsys):
    key, path = write(folders, tmp_path, items=1)
    scores = {"nightjar": 4, "zebrafinch": 2, "wagtail": 5, "anchor": 1}
    total = len(key["items"])
    with Visitor(browser, path) as visitor:
        page, press = visitor.page, visitor.page.keyboard.press
        press("Enter")
        order = visitor.order()
        for place, item in enumerate(order):
            if place == 2:
                page.reload()
                assert f"Welcome back. {total - 2} more" in page.locator("#task").text_content()
                press("Tab")
                press("Tab")
                assert page.evaluate("document.activeElement.id") == "begin"
                press("Space")
            assert page.locator("#count").text_content() == f"{place + 1} of {total}"
            assert page.locator("input:checked").count() == 0  # no default
            press("3")  # too early
            press("Enter")
            assert page.locator("#answers:disabled").count() and page.locator("#next").is_disabled()
            assert page.locator("#count").text_content() == f"{place + 1} of {total}"
            press("Space")
            visitor.heard()
            assert page.locator("#next").is_disabled()  # heard, but not rated
            press(str(scores[system_of(key, item["id"])[0]]))
            press("Enter")
        assert page.locator("#thanks").text_content() == "Done. Thank you!"
        page.reload()  # nor is anything lost now
        assert page.locator("#thanks").is_visible()
        file = visitor.save(tmp_path)
        assert file.name == f"listening-{visitor.kept['listener']}.json"
    answers = json.loads(file.read_text())
    assert answers["complete"] and [answer["item"] for answer in answers["answers"]] == [i["id"] for i in order]
    assert all(answer["plays"] == 1 and answer["seconds"] >= 0.1 for answer in answers["answers"])

    argv = ["listening-results", file, "--key", tmp_path / "key.json", "--out", tmp_path / "results.json"]
    evaluate.main(evaluate.parse_args([*map(str, argv)]))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["system"]: row["mean"] for row in results["systems"]} == scores
    assert results["repeats"] == {"answers": 1, "same": 1.0, "within_one": 1.0}
    assert "nightjar    4.00" in capsys.readouterr().out


def test_by_touch_on_a_phone(browser, folders, tmp_path):
    key, path = write(folders, tmp_path, "pairs", reference=None, items=1)
    strength = ["wagtail", "nightjar", "zebrafinch"]
    phone = dict(viewport=dict(width=360, height=640), has_touch=True, is_mobile=True, device_scale_factor=2)
    with Visitor(browser, path, **phone) as visitor:
        page = visitor.page

        def fits():
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            boxes = [
                box.bounding_box() for box in page.locator("button:visible, a.main:visible, .answer:visible").all()
            ]
            assert boxes and all(box["height"] >= 44 and box["width"] >= 44 for box in boxes)

        fits()
        page.locator("#noise").tap()
        page.locator("#begin").tap()
        order = visitor.order()
        for place, item in enumerate(order):
            first, second = page.locator(".player").all()
            if place == 0:
                fits()
                page.locator("#broken").tap()
                continue
            second.tap()
            page.get_by_text("Now listen to A.").wait_for()
            assert page.locator("#answers:disabled").count()  # one of two
            first.tap()
            visitor.heard()
            systems = [key["sounds"][sound]["system"] for sound in item["sounds"]]
            page.locator(".answer").nth(min(range(2), key=lambda side: strength.index(systems[side]))).tap()
            page.locator("#next").tap()
        fits()
        file = visitor.save(tmp_path, "tap")
    answers = json.loads(file.read_text())
    assert [answer["rating"] for answer in answers["answers"]].count(None) == 1
    assert answers["answers"][0]["plays"] == 0
    rows = analyse_listening([answers], key)["pairs"]
    assert len(rows) >= 2  # one pair could not be played
    for row in rows:
        assert row["win_rate"] == float(strength.index(row["system"]) < strength.index(row["against"]))


def test_stopping_early_pausing_and_the_next_listener(browser, folders, tmp_path):
    key, path = write(folders, tmp_path, reference=None, items=1, repeats=0)
    with Visitor(browser, path) as visitor:
        page, press = visitor.page, visitor.page.keyboard.press
        page.click("#begin")
        page.click(".player")
        page.click(".player")  # pauses
        page.wait_for_timeout(400)
        assert page.locator("#answers:disabled").count()
        press("Space")  # on the button, which has the focus: plays on
        visitor.heard()
        page.locator("input").nth(2).focus()
        press("ArrowRight")  # as in any group of radio buttons
        page.click("#stop")
        assert not json.loads(visitor.save(tmp_path).read_text())["complete"]
        page.click("#resume")
        for _ in key["items"]:
            press("Space")
            visitor.heard()
            press("2")
            press("4")
            press("Enter")
        done = json.loads(visitor.save(tmp_path).read_text())
        assert [answer["rating"] for answer in done["answers"]] == [4] * len(key["items"])
        assert json.loads(page.locator("#text").input_value()) == done
        page.click("#again")
        page.click("#begin")
        assert visitor.kept["listener"] != done["listener"] and visitor.kept["answers"] == []


def test_without_storage_the_page_works_and_says_so(browser, folders, tmp_path):
    _, path = write(folders, tmp_path, reference=None, items=1, repeats=0)
    with Visitor(browser, path) as visitor:
        visitor.page.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error(); }})")
        visitor.page.reload()
        assert visitor.page.locator("#not-stored").is_visible() and not visitor.page.locator("#stored").is_visible()
        visitor.page.click("#begin")
        visitor.page.click("#broken")
        assert visitor.page.locator("#count").text_content() == "2 of 3"


def test_logic_of_the_page(browser, folders, tmp_path):
    _, path = write(folders, tmp_path, reference=None, items=1)
    with Visitor(browser, path) as visitor:
        run = visitor.page.evaluate
        items = [{"id": str(i), "sounds": [f"s{i % 27}", f"t{i % 27}"]} for i in range(30)]  # three come twice
        orders = [run("([items, who]) => presentation(items, who)", [items, f"listener {n}"]) for n in range(60)]
        again = run("([items, who]) => presentation(items, who)", [items, "listener 7"])
        assert again == orders[7]
        places = np.array([[int(item["id"]) for item in order] for order in orders])
        assert (np.sort(places, 1) == np.arange(30)).all()
        assert len({tuple(row) for row in places}) == 60
        assert abs(places[:, 0].mean() - 14.5) < 5 * 8.66 / 60**0.5
        where = np.argsort(places, 1)
        assert (np.abs(where[:, 27:] - where[:, :3]) >= 4).all()  # never soon after another
        swapped = np.mean([item["sounds"][0][0] == "t" for order in orders for item in order])
        assert abs(swapped - 0.5) < 5 * 0.5 / 1800**0.5

        draws = run("() => { const r = randomFrom('x'); return Array.from({length: 20000}, r); }")
        counts = np.histogram(draws, 10, (0, 1))[0]
        assert ((counts - 2000) ** 2 / 2000).sum() < 30  # chi squared, 9 degrees of freedom
        shuffles = run(
            "() => { const r = randomFrom('y'); "
            "return Array.from({length: 6000}, () => shuffled('abc', r).join('')); }"
        )
        assert all(abs(shuffles.count(p) - 1000) < 150 for p in ("abc", "acb", "bac", "bca", "cab", "cba"))

        assert [run("([h, l]) => soundToPlay(h, l)", x) for x in
                ([[False, False], -1], [[True, False], 0], [[False, True], 1], [[True, True], 1], [[True, True], 0])
                ] == [0, 1, 0, 0, 1]  # fmt: skip
        keep = "(text) => restored(text, {id: 'T', items: [{id: 'a'}]})"
        state = {"test": "T", "listener": "x", "answers": [{"item": "a"}]}
        assert run(keep, json.dumps(state)) == state
        for other in (
            "",
            "{",
            "null",
            json.dumps({**state, "test": "U"}),
            json.dumps({**state, "answers": [{"item": "b"}]}),
        ):
            assert run(keep, other) is None
