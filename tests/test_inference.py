"""The script as a whole, with a small random pipeline of each family: what every flag does, and what it refuses."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from exact_networks import quiet, seeds
from small_pipes import save_small_pipes, small_mel
from training_runs import ROOT

import tonefield
from tonefield import inference
from tonefield.command_line import UserError
from tonefield.data.loudness import integrated_loudness


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A pipeline of each family in a folder."""
    return save_small_pipes(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A fifth of a second of noise."""
    file = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(file, 0.3 * np.random.default_rng(0).standard_normal(1600), 8000, subtype="FLOAT")
    return file


@pytest.fixture
def make(models, tmp_path):
    """Runs the script on a model and returns the sounds and the lines of the manifest."""

    def make(model, *flags, out="out", steps=3):
        folder = tmp_path / out
        steps = [] if steps is None else [f"--steps={steps}"]
        inference.main(inference.parse_args([f"--model={models[model]}", f"--output_dir={folder}", *steps, *flags]))
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        return [soundfile.read(folder / line["file_name"], dtype="float32")[0] for line in lines], lines

    return make


def as_written(waveforms):
    """As 16 bits hold it, but for the last of them."""
    return [np.clip(waveform, -1, 1 - 2**-15) for waveform in waveforms]


# ----- sounds are those of the pipeline


def test_classes_take_turns(make, models):
    sounds, lines = make("mel", "--num_samples=3", "--seed=5", "--guidance_scale=2")
    pipe = quiet(tonefield.load(models["mel"]))
    want = pipe(class_labels=[0, 1, 0], guidance_scale=2.0, num_inference_steps=3, generator=seeds(5, 6, 7)).audios
    np.testing.assert_allclose(sounds, as_written(want), atol=1e-4)
    assert [(line["seed"], line["class_label"]) for line in lines] == [(5, "kick"), (6, "snare"), (7, "kick")]


def test_prompts_take_turns_and_come_from_a_file_as_well(make, models, tmp_path):
    (tmp_path / "prompts.txt").write_text("wind\n\nthe roof\n")
    sounds, lines = make("text", "--prompt=rain", f"--prompt={tmp_path / 'prompts.txt'}", "--num_samples=4")
    assert [line["prompt"] for line in lines] == ["rain", "wind", "the roof", "rain"]
    pipe = quiet(tonefield.load(models["text"]))
    prompts = ["rain", "wind", "the roof", "rain"]
    want = pipe(prompts, guidance_scale=3.0, num_inference_steps=3, generator=seeds(0, 1, 2, 3)).audios
    np.testing.assert_allclose(sounds, as_written(want), atol=1e-4)


def test_tokens(make, models):
    sounds, _ = make("tokens", "--class_label=1", "--num_samples=2", "--guidance_scale=1", "--solver=analytic")
    pipe = quiet(tonefield.load(models["tokens"]))
    pipe.register_modules(scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config, predictor="analytic"))
    want = pipe(class_labels=[1, 1], num_inference_steps=3, generator=seeds(0, 1)).audios
    np.testing.assert_allclose(sounds, as_written(want), atol=2**-15)


def test_how_many(make):
    assert len(make("mel")[0]) == 2  # one for each class
    assert len(make("text", out="b")[0]) == 4
    assert len(make("text", "--prompt=rain", "--prompt=wind", out="c")[0]) == 2


# ----- flags


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("mel", ["--guidance_scale=1.5"]),
        ("mel", ["--temperature=0.8"]),
        ("mel", ["--solver=heun"]),
        ("mel", ["--n_iter=2"]),
        ("mel", ["--class_label=snare"]),
        ("mel", ["--seed=1"]),
        ("mel", ["--loudness=-30"]),
        ("mel", ["--fade=0.05"]),
        ("text", ["--prompt=rain"]),
        ("text", ["--prompt=rain", "--guidance_scale=1"]),
        ("text", ["--prompt=rain", "--negative_prompt=wind"]),
        ("text", ["--eta=0.7"]),
        ("text", ["--solver=dpmsolver++"]),
        ("tokens", ["--temperature=0.3"]),
        ("tokens", ["--solver=confidence"]),
    ],
)
def test_a_flag_makes_a_difference(make, model, flags):
    """Within flags that are given in turn, each changes the sound and not its length."""
    one = ["--num_samples=1"]
    previous, _ = make(model, *one, *flags[:-1])
    changed, _ = make(model, *one, *flags, out="changed")
    assert len(previous[0]) == len(changed[0])
    assert np.abs(previous[0] - changed[0]).max() > 1e-3


def test_steps_are_the_pipelines_own_unless_told(make, models):
    usual = inspect.signature(tonefield.MelPFGMPipeline.__call__).parameters["num_inference_steps"].default
    first, _ = make("mel", "--num_samples=1", steps=None)
    second, _ = make("mel", "--num_samples=1", steps=usual, out="b")
    np.testing.assert_array_equal(first, second)


def test_length(make):
    assert len(make("text", "--seconds=0.6", "--num_samples=1")[0][0]) == 4800
    assert len(make("tokens", "--seconds=0.05", "--num_samples=1", out="b")[0][0]) == 400


def test_loop_has_the_length_of_a_ring(make):
    assert len(make("mel", "--loop", "--num_samples=1")[0][0]) == 16 * 128


def test_loudness_and_fade(make):
    sounds, _ = make("mel", "--loudness=-35", "--num_samples=1")
    assert integrated_loudness([sounds[0]], 8000) == pytest.approx(-35, abs=0.05)
    plain, _ = make("mel", "--num_samples=1", out="plain")
    faded, _ = make("mel", "--fade=0.05", "--num_samples=1", out="faded")
    ramp = np.sin(np.linspace(0, np.pi / 2, 400)) ** 2
    np.testing.assert_allclose(faded[0][:400], plain[0][:400] * ramp, atol=1e-4)
    np.testing.assert_array_equal(faded[0][400:-400], plain[0][400:-400])
    np.testing.assert_allclose(faded[0][-400:], plain[0][-400:] * ramp[::-1], atol=1e-4)


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3"])
def test_formats(make, kind, tmp_path):
    _, lines = make("mel", "--num_samples=1", f"--output_format={kind}")
    assert soundfile.info(tmp_path / "out" / lines[0]["file_name"]).format == kind.upper()


# ----- from a sound


@pytest.mark.parametrize("model", ["mel", "text", "tokens"])
def test_inpainting_keeps_the_rest(make, model, sound):
    given, _ = soundfile.read(sound, dtype="float32")
    if model == "tokens":  # whose network has seen 64 samples
        given = given[:256]
        sound = sound.with_name("short.wav")
        soundfile.write(sound, given, 8000, subtype="FLOAT")
        start, end = 100, 180
    else:
        start, end = 700, 1100
    sounds, _ = make(model, f"--audio={sound}", f"--inpaint={start / 8000}:{end / 8000}", "--num_samples=2")
    for new in sounds:
        kept = np.ones(len(given), bool)
        kept[max(0, start - 260) : end + 260] = False
        if model == "tokens":
            kept[max(0, start - 84) : end + 84] = False
            kept[: start - 84] = True
        np.testing.assert_allclose(new[: len(given)][kept], as_written([given])[0][kept], atol=2**-15)
        assert np.abs(new[start:end] - given[start:end]).max() > 1e-3
    assert np.abs(sounds[0] - sounds[1]).max() > 1e-3


def test_strength(make, sound):
    given, _ = soundfile.read(sound, dtype="float32")
    near, _ = make("mel", f"--audio={sound}", "--strength=0.1", "--num_samples=1", steps=10)
    far, _ = make("mel", f"--audio={sound}", "--strength=1", "--num_samples=1", steps=10, out="far")
    mel = small_mel()

    def spectrum(x):
        return mel.encode(torch.from_numpy(np.pad(x, (0, mel.slice_samples - len(x))))[None])

    want = spectrum(given)
    assert (spectrum(near[0]) - want).abs().mean() < 0.5 * (spectrum(far[0]) - want).abs().mean()


@pytest.mark.parametrize(("model", "seconds"), [("mel", 0.25), ("text", 0.7)])
def test_continuation(make, model, seconds, sound):
    given, _ = soundfile.read(sound, dtype="float32")
    sounds, _ = make(model, f"--audio={sound}", f"--continue_to={seconds}", "--num_samples=1")
    np.testing.assert_allclose(sounds[0][:1400], as_written([given])[0][:1400], atol=2**-15)
    assert np.abs(sounds[0][1700 : int(8000 * seconds)]).max() > 1e-3
    if model == "text":
        assert len(sounds[0]) == 8000 * seconds


def test_interpolation_of_seeds_goes_through_their_noise(make):
    ends = [
        make("mel", "--num_samples=1", f"--seed={seed}", "--class_label=kick", out=f"{seed}")[0] for seed in (3, 8)
    ]
    path, _ = make("mel", "--interpolate", "3", "8", "5", "--class_label=kick")
    # Griffin-Lim begins with other phases: only spectra are the same
    mel = small_mel()
    spectra = mel.encode(torch.tensor(np.stack([ends[0][0], *path, ends[1][0]])))
    assert (spectra[0] - spectra[1]).abs().mean() < 0.1 * (spectra[1] - spectra[-2]).abs().mean()
    assert (spectra[-1] - spectra[-2]).abs().mean() < 0.1 * (spectra[1] - spectra[-2]).abs().mean()


@pytest.mark.parametrize("model", ["mel", "text"])
def test_interpolation_of_sounds_is_the_pipelines(make, models, model, sound):
    other = sound.with_name("other.wav")
    soundfile.write(other, 0.2 * np.sin(np.arange(1600) / 3), 8000, subtype="FLOAT")
    steps = None if model == "mel" else 3
    sounds, _ = make(model, "--interpolate", str(sound), str(other), "3", steps=steps)
    pipe = quiet(tonefield.load(models[model]))
    ends = [soundfile.read(file, dtype="float32")[0] for file in (sound, other)]
    if model == "mel":
        ends = [np.pad(end, (0, pipe.mel.slice_samples - len(end))) for end in ends]
    options = {} if model == "mel" else {"num_inference_steps": 3}
    want = pipe.interpolate(*ends, 3, generator=seeds(0, 1, 2), **options).audios
    np.testing.assert_allclose(sounds, as_written(want), atol=1e-3)


# ----- runs


def test_a_run_that_was_stopped_goes_on(make, tmp_path):
    _, lines = make("mel", "--num_samples=7", "--batch_size=3")
    folder = tmp_path / "out"
    before = {line["file_name"]: (folder / line["file_name"]).read_bytes() for line in lines}
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.wav")}
    # as if the power had failed after the fourth sound, in the middle of a line
    text = "".join(json.dumps(line) + "\n" for line in lines[:4]) + json.dumps(lines[4])[:30]
    (folder / "manifest.part-0.jsonl").write_text(text)
    for name in ("manifest.jsonl", "004.wav", "005.wav", "006.wav"):
        (folder / name).unlink()
    _, lines_again = make("mel", "--num_samples=7", "--batch_size=3")
    assert lines_again == lines
    assert {line["file_name"]: (folder / line["file_name"]).read_bytes() for line in lines} == before
    assert [name for name, time in sorted(times.items()) if (folder / name).stat().st_mtime_ns == time] == [
        "000.wav", "001.wav", "002.wav", "003.wav",
    ]  # fmt: skip
    assert not list(folder.glob("manifest.part*"))


@pytest.mark.parametrize("model", ["mel", "text", "tokens"])
def test_any_line_can_be_made_again(make, model, tmp_path, capsys):
    _, lines = make(model, "--num_samples=5", "--batch_size=3")
    again = ["--again", str(tmp_path / "out" / "manifest.jsonl"), "--lines", "4", "1"]
    inference.main(inference.parse_args(again))
    said = capsys.readouterr().out
    assert said.count("the same, bit for bit") == 2
    for line in (lines[1], lines[4]):
        files = [tmp_path / folder / line["file_name"] for folder in ("out", "out-again")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(file.name for file in (tmp_path / "out-again").glob("*.wav")) == ["001.wav", "004.wav"]


def test_a_model_without_sound(models, tmp_path):
    for name, part, what in (("mel", "mel", "images"), ("tokens", "audio_tokenizer", "tokens")):
        pipe = tonefield.load(models[name], **{part: None})
        pipe.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=rf"makes no sound: from Python, .* returns \.{what}"):
            inference.main(inference.parse_args([f"--model={tmp_path / name}"]))


def test_another_model_or_other_settings_are_told_apart(make, models, tmp_path):
    make("mel", "--num_samples=1")
    with pytest.raises(UserError, match="holds sounds of another run"):
        make("mel", "--num_samples=1", "--temperature=0.9")
    manifest = tmp_path / "out" / "manifest.jsonl"
    line = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(line | {"settings": line["settings"] | {"model": str(models["text"])}}))
    with pytest.raises(UserError, match="the manifest's"):
        inference.main(inference.parse_args([f"--again={manifest}"]))


def test_folder_of_its_own_for_each_setting(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--temperature=0.9"], []):
        inference.main(inference.parse_args([f"--model={models['mel']}", "--steps=2", "--num_samples=1", *flags]))
    assert len(list((tmp_path / "sounds").glob("mel-*"))) == 2


def test_pictures(make, tmp_path):
    from PIL import Image

    make("mel", "--num_samples=3", "--batch_size=2")
    for name in ("000.png", "002.png", "overview.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert np.asarray(picture).std() > 10


@pytest.mark.slow
def test_two_processes_share_the_work(make, models, tmp_path):
    make("mel", "--num_samples=7", "--batch_size=2")
    # With `--cpu` accelerate starts one process, however many it is asked for.
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes=2 --main_process_port=0 inference.py"
    command, environment = [sys.executable, *launch.split()], os.environ | {"ACCELERATE_USE_CPU": "true"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # on which the last bits depend
    flags = [f"--model={models['mel']}", "--steps=3", "--num_samples=7", "--batch_size=2"]
    command += [*flags, f"--output_dir={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.count("7 sounds in") == 1
    lines = [(tmp_path / folder / "manifest.jsonl").read_text() for folder in ("out", "two")]
    assert lines[0] == lines[1]
    for file in (tmp_path / "out").glob("*.wav"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


# ----- what is refused


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("mel", ["--prompt=rain"], "--prompt is of no use to this MelPFGMPipeline: its model reads no text"),
        ("mel", ["--seconds=2"], "--seconds is of no use .* sounds of 0.26 s"),
        ("mel", ["--eta=0.5"], "--eta is of no use"),
        ("mel", ["--negative_prompt=rain"], "--negative_prompt is of no use"),
        ("mel", ["--class_label=tom"], "--class_label tom is unknown: the model's classes are kick, snare"),
        ("mel", ["--solver=ddim"], "--solver ddim: .*euler, heun"),
        ("mel", ["--audio=none.wav", "--strength=0.5"], "--audio none.wav cannot be used"),
        ("mel", ["--audio=SOUND", "--inpaint=0.1:3"], "--inpaint 0.1:3 ends after .*0.20 s long"),
        ("mel", ["--audio=SOUND", "--continue_to=0.1"], "--continue_to 0.1 is not beyond"),
        ("mel", ["--audio=SOUND", "--continue_to=9"], "--continue_to 9 is longer than what this .* makes, 0.26 s"),
        ("mel", ["--interpolate", "a.wav", "3", "4"], "--interpolate a.wav is neither a seed nor a sound file"),
        ("mel", ["--interpolate", "SOUND", "SOUND", "3"], "--steps is of no use"),
        ("mel", ["--audio=SOUND", "--strength=1.5"], "strength is 1.5"),
        ("text", ["--class_label=0"], "--class_label is of no use .*knows no classes"),
        ("text", ["--temperature=2"], "--temperature is of no use"),
        ("text", ["--prompt=nothing.txt"], "--prompt nothing.txt cannot be read"),
        ("text", ["--guidance_scale=2"], "guidance_scale is 2.0, but there is no prompt"),
        ("text", ["--solver=magic"], "--solver magic is none of"),
        ("text", ["--eta=0.5", "--solver=euler"], "has no eta"),
        ("tokens", ["--vocoder=x"], "--vocoder is of no use"),
        ("tokens", ["--n_iter=3"], "--n_iter is of no use .*does not use Griffin-Lim"),
        ("tokens", ["--audio=SOUND", "--strength=0.5"], "--strength is of no use"),
        ("tokens", ["--interpolate", "1", "2", "3"], "--interpolate is of no use"),
        ("tokens", ["--class_label=7"], "--class_label 7 is unknown: the model's classes are 0 to 1"),
    ],
)
def test_what_the_pipeline_has_no_use_for(make, sound, model, flags, message):
    flags = [flag.replace("SOUND", str(sound)) for flag in flags]
    with pytest.raises(UserError, match=message) as caught:
        make(model, *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strength=0.5"], "--strength wants a sound"),
        (["--audio=a.wav"], "--audio wants to know what to do"),
        (["--inpaint=3"], "'3' is not of the form START:END"),
        (["--inpaint=3:2"], "'3:2' does not end after it starts"),
        (["--interpolate", "1", "2", "1"], "from 2 on, not '1'"),
        (["--num_samples=0"], "--num_samples is 0: it must be positive"),
        (["--loop", "--fade=1"], "leave one out"),
        (["--lines", "3"], "--lines belongs to --again"),
        (["--audio=a.wav", "--continue_to=3", "--seconds=4"], "leave one out"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        inference.parse_args(flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=nowhere/to-be-found"], "--model nowhere/to-be-found cannot be loaded"),
        (["--again=gone.jsonl"], "There is no file gone.jsonl"),
        (["--again=gone.jsonl", "--steps=3"], "leave --steps out"),
    ],
)
def test_what_cannot_be_found(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        inference.main(inference.parse_args(flags))
