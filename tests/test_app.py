"""The page: what its functions make is what `inference.py` makes, and a person's way through it in a real browser."""

import base64
import html
import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import soundfile
from PIL import Image
from small_pipes import save_small_pipes
from training_runs import ROOT

from tonefield import app, inference
from tonefield.command_line import UserError
from tonefield.pipelines import from_flags


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_small_pipes(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(folders):
    return {name: app.open_model(str(folder)) for name, folder in folders.items()}


def wanted(model, **changes):
    """What the controls say in the beginning, but for fewer steps."""
    label = model.classes[0] if model.classes else None
    texts = dict(prompt="", negative_prompt="", class_label=label, solver=model.solvers[0])
    return texts | dict(steps=4, guidance_scale=3, seconds=model.seconds, loop=False, seed=7) | changes


def generate(model, **changes):
    return app.make(model, app.flags_of(model, wanted(model, **changes)))


def waveform_of(take):
    return soundfile.read(io.BytesIO(take.wav), dtype="float32")[0]


# ----- what is offered


def test_controls_are_those_that_the_model_has_a_use_for(models):
    always = {"steps", "solver", "seed", "guidance_scale", "loop"}
    edits = {name: model.controls - set(app.CONTROLS) for name, model in models.items()}
    shown = {name: model.controls.intersection(app.CONTROLS) for name, model in models.items()}
    assert shown["mel"] == always | {"class_label"}
    assert shown["text"] == always | {"prompt", "negative_prompt", "seconds"}
    assert shown["tokens"] == always | {"class_label", "seconds"}
    assert "strength" in edits["mel"] and "strength" in edits["text"] and "strength" not in edits["tokens"]
    assert [model.classes for model in models.values()] == [["kick", "snare"], [], ["0", "1"]]
    assert [model.steps for model in models.values()] == [18, 50, 128]
    assert models["mel"].seconds == 0.256 and models["tokens"].seconds == 0.032


def test_solvers_are_those_that_the_scheduler_knows_its_own_first(models):
    assert models["mel"].solvers == ["dpmsolver++", "heun", "euler", "rk45"]
    assert models["text"].solvers[0] == "ddim" and set(models["text"].solvers) == set(from_flags.SOLVERS)
    assert models["tokens"].solvers[0] == "event"
    assert set(models["tokens"].solvers) == {"event", "analytic", "euler", "remdm", "confidence"}


def test_models_that_come_along(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(from_flags, "PRETRAINED", folders["mel"].parent)
    monkeypatch.chdir(folders["mel"].parent.parent)
    here = folders["mel"].parent.name
    assert app.names_of_models(None) == [f"{here}/mel", f"{here}/text", f"{here}/tokens"]
    assert app.names_of_models(["b", "a", "b"]) == ["b", "a"]
    assert app.labels_of([f"{here}/mel", "user/mel"]) == [("mel", f"{here}/mel"), ("user/mel", "user/mel")]
    shutil.copytree(f"{here}/mel", tmp_path / "mel")
    assert app.labels_of([f"{here}/mel", str(tmp_path / "mel")])[0] == (f"{here}/mel", f"{here}/mel")


def test_an_empty_prompt_says_what_can_be_asked_for(models):
    shown = app.shown_of(app.open_model(str(ROOT / "pretrained" / "digits-latent-text")))
    assert '"jackson says seven"' in shown["prompt"]["placeholder"]
    assert app.shown_of(models["text"])["prompt"]["placeholder"] is None


# ----- sounds


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mel", {"class_label": "snare", "solver": "heun"}),
        ("mel", {"loop": True, "guidance_scale": 1}),
        ("text", {"prompt": 'rain\'s "on" the roof', "negative_prompt": "wind", "seconds": 0.6}),
        ("text", {"negative_prompt": "of no use without a prompt"}),
        ("text", {"prompt": "rain", "negative_prompt": "wind", "guidance_scale": 1}),
        ("tokens", {"class_label": "1", "solver": "analytic", "seconds": 0.05}),
    ],
)
def test_a_sound_is_what_its_command_makes(models, name, changes, tmp_path):
    take = generate(models[name], **changes)
    python, script, *words = shlex.split(take.command)
    assert (python, script) == ("python", "inference.py") and "--seed 7" in take.command
    inference.main(inference.parse_args([*words, f"--output_dir={tmp_path / 'out'}"]))
    assert (tmp_path / "out" / "000.wav").read_bytes() == take.wav
    assert take.seconds == soundfile.info(io.BytesIO(take.wav)).duration
    for value in changes.values():
        if value not in (True, 1, "wind", "of no use without a prompt"):
            assert shlex.quote(str(value)) in take.command


@pytest.mark.parametrize("name", ["mel", "text", "tokens"])
def test_edits_are_what_their_commands_make(models, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = models[name]
    first = generate(model, prompt="rain")
    says, end = wanted(model, prompt="rain", seed=8), first.seconds
    edits = {"mend": app.mend_spans(model, first, says, app.silent, f"0:{end / 4:.3f} {end * 0.6:.4f}:9")}
    if "strength" in model.controls:
        edits["vary"] = app.edit(model, first, says, strength=0.5)
    if "seconds" in model.controls:
        edits["lengthen"] = app.lengthen(model, first, says, app.silent, 0.01)
        assert edits["lengthen"].seconds == pytest.approx(end + 0.01, abs=2e-4)
    edits["close"] = app.close(model, first, says)
    (tmp_path / first.name).write_bytes(first.wav)
    for edit, take in edits.items():
        inference.main(inference.parse_args([*shlex.split(take.command)[2:], f"--output_dir={edit}"]))
        made, want = waveform_of(take), soundfile.read(tmp_path / edit / "000.wav", dtype="float32")[0]
        # spans are written with six digits
        np.testing.assert_allclose(made, want, atol=2**-15 if edit in ("vary", "lengthen") else 1e-3, err_msg=edit)
        assert take.wav != first.wav and len({take.wav for take in edits.values()}) == len(edits)


def test_mending_keeps_what_is_not_marked(models):
    first = generate(models["mel"])
    mended = app.mend_spans(models["mel"], first, wanted(models["mel"], seed=8), app.silent, "0.1:0.15")
    before, after = waveform_of(first), waveform_of(mended)
    old = np.r_[: 800 - 160, 1200 + 160 : len(before)]  # but for half a window beside what is new
    np.testing.assert_array_equal(before[old], after[old])
    assert np.abs(before - after)[800:1200].max() > 1e-3


@pytest.mark.parametrize("name", ["mel", "text", "tokens"])
def test_a_loop_stays_one(models, name):
    model = models[name]
    first = generate(model, prompt="rain")
    loop = app.close(model, first, wanted(model, prompt="rain", seed=8))
    before, after = waveform_of(first), waveform_of(loop)
    assert loop.loops and not first.loops
    middle = slice(len(before) * 3 // 8, len(before) * 5 // 8)
    if name != "tokens":  # whose frames are a large part of so short a sound
        np.testing.assert_array_equal(after[middle], before[middle])
    for seam in (slice(len(before) // 16), slice(len(before) * 15 // 16, len(before))):
        assert np.abs(after[seam] - before[seam]).max() > 1e-3
    again = app.mend_spans(model, loop, wanted(model, prompt="rain", seed=9), app.silent, f"0:{loop.seconds / 5}")
    assert again.loops and len(again.wav) == len(loop.wav)
    if "seconds" in model.controls:
        longer = app.lengthen(model, loop, wanted(model, prompt="rain"), app.silent, 0.02)
        assert not longer.loops and longer.seconds > loop.seconds


def test_edits_do_not_heed_what_new_sounds_are_to_be_like(models):
    model = models["text"]
    first = generate(model)
    varied = app.edit(model, first, wanted(model, loop=True, seconds=0.9), strength=0.5)
    assert varied.seconds == first.seconds and not varied.loops


def test_a_sound_of_any_length_can_be_closed(models):
    model = models["text"]  # whose networks halve 128 samples a frame once
    first = generate(model, seconds=0.35)
    assert len(waveform_of(app.close(model, first, wanted(model)))) == 2800 // 256 * 256


def test_comparison_is_of_the_same_noise(models):
    model = models["mel"]
    lists = list(app.compare(model, wanted(model, solver="heun", steps=9), ["euler", "heun", "rk45"], [3, 2]))
    takes = lists[-1]
    assert [take.title for take in takes] == [
        f"{solver}, {steps} steps" for solver in ("euler", "heun", "rk45") for steps in (2, 3)
    ]
    assert [int(take.cost.split()[0]) for take in takes] == [2, 3, 3, 5, 7, 13]
    assert takes[0].wav == generate(model, solver="euler", steps=2).wav
    with pytest.raises(UserError, match="at least one solver"):
        next(app.compare(model, wanted(model), [], [3]))


def test_steps_are_told(models):
    told = []
    app.make(models["mel"], app.flags_of(models["mel"], wanted(models["mel"])), lambda *at: told.append(at))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not models["mel"].pipe.unet._forward_hooks  # which counted the network's calls


def test_a_prompt_is_never_taken_for_a_file(models, tmp_path):
    (tmp_path / "secret.txt").write_text("nobody's business")
    assert generate(models["text"], prompt=str(tmp_path / "secret.txt")).title == str(tmp_path / "secret.txt")


def test_a_sound_of_ones_own(models, tmp_path):
    noise = 0.3 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(tmp_path / "a.wav", np.pad(noise, (8000, 8000)), 16000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 8000)
    long, short = (app.given_take(models[name], str(tmp_path / "a.wav")) for name in ("text", "mel"))
    assert long.rate == 8000 and long.seconds == pytest.approx(1.1, abs=0.01)
    assert short.seconds == (16 * 128 - 1) / 8000
    assert app.edit(models["mel"], short, wanted(models["mel"]), strength=0.5).seconds == short.seconds
    with pytest.raises(UserError, match="This sound is silent"):
        app.given_take(models["mel"], str(tmp_path / "silence.wav"))
    (tmp_path / "b.wav").write_text("no sound")
    with pytest.raises(UserError, match=r"This sound cannot be used: .+"):
        app.given_take(models["mel"], str(tmp_path / "b.wav"))


# ----- what is refused


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0.1:0.2", [(0.1, 0.2)]),
        ("0:0.1, 0.4:3", [(0.0, 0.1), (0.4, 1.0)]),
        ("", "Nothing is marked"),
        ("0.2", "'0.2' is not of the form START:END"),
        ("1:2", "1 s lies beyond the end of the sound, which is 1.00 s long"),
    ],
)
def test_spans(text, want):
    if isinstance(want, str):
        with pytest.raises(UserError, match=want):
            app.read_spans(text, 1.0)
    else:
        assert app.read_spans(text, 1.0) == want


def test_edits_want_a_sound(models):
    model = models["mel"]
    for edit in (app.edit, app.close, lambda *a: app.mend_spans(*a, app.silent, "0:1")):
        with pytest.raises(UserError, match="There is no sound yet"):
            edit(model, None, wanted(model))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: There are no models in .*pretrained: name one, --model FOLDER or USER/NAME"),
        (["--model=MEL"], "error: The page is made with gradio, which is not here: pip install tonefield\\[demo\\]"),
    ],
)
def test_what_is_missing_is_said_in_a_line(flags, message, folders, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(from_flags, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as caught:
        app.run(app.main, app.parse_args([flag.replace("MEL", str(folders["mel"])) for flag in flags]))
    assert re.fullmatch(message + ".*", str(caught.value.code))


def test_models_without_sound_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--model .*nowhere cannot be loaded"):
        app.open_model(str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit):
        app.parse_args(["--port=0"])


# ----- what is shown


def test_figure_holds_the_sound_and_its_picture(models):
    take = generate(models["mel"])
    take.title = 'a {{b}} ${c} `d` \\e <f> "g"'
    figure = app.figure_of(take, current=True)
    wavs = [base64.b64decode(data) for data in re.findall(r"data:audio/wav;base64,([^\"]+)", figure)]
    assert wavs == [take.wav, take.wav]  # to play and to download
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", figure)[1]))) as picture:
        assert np.asarray(picture).std() > 10
    title = re.search("<b>(.*)</b>", figure)[1]
    assert html.unescape(title) == take.title and not set(title) & set('{}$`\\<>"')
    assert html.unescape(re.search("<code>(.*)</code>", figure)[1]) == take.command
    assert "<code>" not in app.figure_of(take)
    for loops in (False, True):
        take.loops = loops
        assert ("loop" in re.search("<audio ([^>]*) src", app.figure_of(take))[1].split()) == loops


# ----- in a browser


@pytest.fixture
def address(folders):
    """The page, served on a port of its own."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--model={folders[name]}" for name in ("mel", "text", "tokens")]
    server = subprocess.Popen(
        [sys.executable, "app.py", *flags, f"--port={port}"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.communicate(timeout=20)


@pytest.mark.slow
def test_a_way_through_the_page(browser, address, tmp_path):
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.set_default_timeout(30_000)
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def after(button):
        """The picture that a button makes, and what is said of it."""
        old = page.evaluate("document.querySelector('#sound audio')?.src")
        page.locator(button).click()
        page.wait_for_function("old => document.querySelector('#sound audio')?.src != old", arg=old)
        return page.locator("#sound figcaption").inner_text()

    def audio():
        return page.locator("#sound audio").get_attribute("src")

    def choose(name):
        page.get_by_label("Model").click()
        page.get_by_role("option", name=name).click()

    page.goto(address)
    page.get_by_label("snare").check()
    assert not page.locator("#prompt").is_visible() and not page.locator("#vary").is_visible()
    said = after("#make")
    assert "snare" in said and "18 network calls" in said
    page.wait_for_function("document.querySelector('#sound audio').readyState == 4")
    first = audio()

    # paint a span, another that touches it, and take it away by a tap
    page.locator("#sound .picture").scroll_into_view_if_needed()
    box = page.locator("#sound .picture").bounding_box()

    def drag(start, end):
        page.mouse.move(box["x"] + start * box["width"], box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + end * box["width"], box["y"] + 70, steps=4)
        page.mouse.up()

    def marked():
        field = page.locator("#spans textarea, #spans input").input_value()
        return [float(time) for time in re.split("[: ]", field)] if field else []

    drag(0.5, 0.25)
    assert marked() == pytest.approx([0.064, 0.128], abs=0.002)
    drag(0.75, 0.45)
    assert marked() == pytest.approx([0.064, 0.192], abs=0.002)
    drag(0.9, 1.2)  # beyond the edge
    assert len(marked()) == 4 and page.locator("#sound .span").count() == 2
    drag(0.95, 0.95)
    assert page.locator("#sound .span").count() == 1
    mark = page.locator("#sound .span").bounding_box()
    assert mark["x"] - box["x"] == pytest.approx(0.25 * box["width"], abs=3)
    after("#mend")
    assert page.locator("#sound .span").count() == 0 and marked() == []
    mended = audio()
    before, now = (soundfile.read(io.BytesIO(base64.b64decode(url.partition(",")[2])))[0] for url in (first, mended))
    changed = np.flatnonzero(before != now) / 8000
    assert 0.02 < changed.min() < 0.07 and 0.18 < changed.max() < 0.215

    # a tap plays from there
    page.wait_for_function("document.querySelector('#sound audio').readyState == 4")
    page.evaluate("document.querySelector('#sound audio').pause()")
    page.evaluate(
        "() => { document.querySelector('#sound audio').play = function () { this.dataset.at = this.currentTime; }; }"
    )
    box = page.locator("#sound .picture").bounding_box()
    drag(0.5, 0.5)
    assert float(page.locator("#sound audio").get_attribute("data-at")) == pytest.approx(0.128, abs=0.003)

    assert "7 network calls" in after("#vary")  # 0.4 of 18 steps
    assert "loop" in after("#ring") and page.locator("#sound audio[loop]").count() == 1
    after("#undo")
    after("#undo")
    assert audio() == mended
    page.locator("#mend").click()
    page.get_by_text("Nothing is marked: drag across the picture first.").wait_for()
    assert audio() == mended

    page.get_by_text("Compare solvers and steps").click()
    page.locator("#against").click()
    page.wait_for_function("document.querySelectorAll('#comparison .take').length == 4")
    costs = page.locator("#comparison figcaption span").all_inner_texts()
    assert [int(cost.split()[0]) for cost in costs] == [4, 18, 7, 35]

    # other models have other controls
    choose("text")
    page.locator("#prompt textarea").fill("rain {{value}} ${1 + 1} <b>")
    assert not page.locator("#classes").is_visible()
    assert "rain {{value}} ${1 + 1} <b>" in after("#make")
    after("#further")
    assert float(page.locator("#sound .picture").get_attribute("data-seconds")) > 1.2
    choose("tokens")
    page.get_by_label("1", exact=True).check()
    page.locator("#vary").wait_for(state="hidden")
    assert re.match(r"1\n\d+ network calls", after("#make"))  # those in which nothing happens are left out
    soundfile.write(tmp_path / "mine.wav", 0.3 * np.random.default_rng(0).standard_normal(2000), 16000)
    old = audio()
    page.locator("input[type=file]").last.set_input_files(tmp_path / "mine.wav")
    page.wait_for_function("old => document.querySelector('#sound audio').src != old", arg=old)
    assert "Your sound" in page.locator("#sound figcaption").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not complaints
    assert all(url.startswith(("data:", "blob:", address)) for url in requests)
    page.close()
