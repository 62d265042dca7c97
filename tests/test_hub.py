"""Models and datasets on a Hub on this machine: what arrives there, what comes back, what is said when that fails."""

import json
import os
import re
import shlex
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from fake_hub import STRANGER, TOKEN, check_players
from small_pipes import save_small_pipes
from token_runs import tokenize
from training_runs import ROOT, make_dataset, make_sounds, train

import tonefield
from tonefield import audio_to_images, audio_to_tokens, inference
from tonefield.command_line import UserError
from tonefield.data.publishing import publish_dataset
from tonefield.pipelines.tonefield_repository import CARD_MARK, plain, table


KINDS = ("mel", "text", "tokens")
NETWORK = {"mel": "unet", "text": "unet", "tokens": "transformer"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folders of a pipeline of each family."""
    return save_small_pipes(tmp_path_factory.mktemp("small"))


@pytest.fixture
def forget(monkeypatch, tmp_path):
    """Makes this machine one that has downloaded nothing so far."""
    places = iter(range(100))
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"new{next(places)}"))


def network(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def first_weight(pipe):
    return next(network(pipe).parameters()).detach().clone()


# ----- there and back


@pytest.mark.parametrize("kind", KINDS)
def test_revisions_are_heeded(hub, small, kind):
    """A branch, a tag and a commit each bring the weights that they name."""
    pipe, name = tonefield.load(small[kind]), "someone/x"
    expected = []
    for _ in range(3):
        expected.append(first_weight(pipe))
        commit = pipe.push_to_hub(name).oid
        hub.refs["models", name, f"v{len(expected)}"] = hub.commits[commit]
        if len(expected) == 2:
            second = commit
        with torch.no_grad():
            next(network(pipe).parameters()).add_(1)
    for revision, weight in {"v1": 0, "v2": 1, second: 1, "v3": 2, "main": 2, None: 2}.items():
        loaded = tonefield.load(name, **({} if revision is None else {"revision": revision}))
        assert torch.equal(first_weight(loaded), expected[weight]), revision
    with pytest.raises(OSError, match=r"someone/x .*nope is not a valid git identifier") as error:
        tonefield.load(name, revision="nope")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_there_and_back(hub, small, kind, tmp_path):
    """`variant` and `dtype`, from a folder and from the Hub; of the Hub only the files of the variant are fetched."""
    exact, name = tonefield.load(small[kind]), "someone/half"
    half = tonefield.load(small[kind], dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    half.push_to_hub(name, variant="fp16")
    exact.push_to_hub(name)
    weights = f"{NETWORK[kind]}/diffusion_pytorch_model"
    files = hub.files["models", name]
    assert len(files[f"{weights}.fp16.safetensors"]) < 0.75 * len(files[f"{weights}.safetensors"])
    for place in (tmp_path / "half", name):
        hub.requests.clear()
        loaded = tonefield.load(place, variant="fp16", dtype=torch.float16)
        assert not [request for request in hub.requests if "/resolve/" in request and "model.safetensors" in request]
        assert torch.equal(first_weight(loaded), first_weight(exact).half()) and network(loaded).dtype == torch.float16
    assert torch.equal(first_weight(tonefield.load(name)), first_weight(exact))
    with pytest.raises((OSError, ValueError), match=r"fp16|variant"):
        tonefield.load(small[kind], variant="fp16")


@pytest.mark.parametrize("kind", KINDS)
def test_device_maps_as_diffusers_has_them(small, kind):
    """One device, or the strategy that deals components to devices; others are refused with what there is."""
    expected = first_weight(tonefield.load(small[kind]))
    for device_map in ("cpu", "balanced"):
        loaded = tonefield.load(small[kind], device_map=device_map)
        assert torch.equal(first_weight(loaded), expected) and network(loaded).device.type == "cpu"
    assert tonefield.load(small[kind], device_map="cpu").hf_device_map == "cpu"
    with pytest.raises(NotImplementedError, match=r"auto not supported. Supported strategies are: balanced"):
        tonefield.load(small[kind], device_map="auto")


def test_nothing_is_unpickled(small, tmp_path):
    """Where there are no safetensors, what PyTorch pickled is not taken in their place."""
    pipe = tonefield.load(small["mel"])
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").exists()
    with pytest.raises(OSError, match="safetensors"):
        tonefield.load(tmp_path)


# ----- who may read


def test_private_repositories_are_one_line(hub, small, forget, monkeypatch, tmp_path):
    tonefield.load(small["tokens"]).push_to_hub("someone/secret", private=True)
    refused = "there is no such repository, or it is private and not for this token .*hf auth login"
    for token, message in ((None, refused), (STRANGER, refused), ("hf_wrong", "does not know the token .401")):
        forget()
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        for load in (
            lambda: tonefield.load("someone/secret"),
            lambda: tonefield.load(small["mel"], vocoder="someone/secret"),
            lambda: tonefield.models.load_audio_tokenizer("someone/secret", subfolder="audio_tokenizer"),
        ):
            with pytest.raises(OSError, match=message) as error:
                load()
            assert "\n" not in str(error.value) and "developer.mozilla" not in str(error.value)
        with pytest.raises(UserError, match=f"^--model someone/secret cannot be loaded: .*{message}"):
            inference.main(inference.parse_args(["--model=someone/secret", f"--output_dir={tmp_path}"]))
    assert type(tonefield.load("someone/secret", token=TOKEN)) is tonefield.SEDDTokenPipeline


# ----- what breaks off


@pytest.mark.parametrize("fault", ["cut", "drop", 503])
def test_a_download_that_breaks_off_can_be_repeated(hub, small, forget, fault, tmp_path):
    pipe = tonefield.load(small["mel"])
    pipe.push_to_hub("someone/x")
    forget()
    hub.fault = lambda request: fault if request.startswith("GET") and "/unet/diff" in request else None
    with pytest.raises(UserError, match=r"^--model someone/x cannot be loaded: .*Load it again") as error:
        inference.main(inference.parse_args(["--model=someone/x", f"--output_dir={tmp_path}"]))
    assert "\n" not in str(error.value)
    hub.fault = lambda request: None
    loaded = tonefield.load("someone/x")
    assert all(
        torch.equal(a, b) for a, b in zip(network(loaded).parameters(), network(pipe).parameters(), strict=True)
    )


def test_a_download_goes_on_where_it_broke_off(hub, small, forget):
    """The client itself tries again; the weights are those that were pushed."""
    pipe, tries = tonefield.load(small["mel"]), []
    pipe.push_to_hub("someone/x")
    forget()

    def once(request):
        if request.startswith("GET") and "/unet/diff" in request:
            tries.append(request)
            return "cut" if len(tries) == 1 else None

    hub.fault = once
    assert torch.equal(first_weight(tonefield.load("someone/x")), first_weight(pipe))
    assert len(tries) == 2


SHORT = ("--max_train_steps=1", "--validation_steps=1", "--num_validation_samples=2")


@pytest.mark.parametrize(("place", "fault"), [("/large/", "drop"), ("/commit/", 503)])
def test_a_push_that_breaks_off_can_be_repeated(hub, mels, tmp_path, place, fault):
    """From a training: the message is one line, the folder whole, and what the message says works."""
    hub.fault = lambda request: fault if place in request else None
    with pytest.raises(UserError, match=r"The pipeline is whole in .*out, but was not pushed: .*Try again") as error:
        train(tmp_path / "out", mels, "--push_to_hub", "--hub_model_id=someone/x", *SHORT)
    assert "\n" not in str(error.value) and not hub.files["models", "someone/x"]
    hub.fault = lambda request: None
    (call,) = re.findall(r"Try again with (tonefield\..*)\.$", str(error.value))
    exec(call, {"tonefield": tonefield})
    assert torch.equal(first_weight(tonefield.load("someone/x")), first_weight(tonefield.load(tmp_path / "out")))
    check_players(hub, "models", "someone/x")


# ----- cards


HOSTILE = "</audio><script>alert('`|`')</script> [x](http://e.example) | ```\n## *end*"


def test_hostile_words_stay_words():
    """Of what could be taken for a tag, a cell, a span of code or a link nothing is left, but the words are."""
    import html

    text = plain(HOSTILE)
    assert html.unescape(text) == HOSTILE.replace("\n", " ") and not set("<>|`*[]\n") & set(text)
    (row,) = table({"classes": [HOSTILE, "kick"]})
    assert row.startswith("| classes | ") and row.endswith(", kick |") and row.count("|") == 3 and "<" not in row
    (row,) = table({"command": "`a|b --x '<i>'` <script>"})
    assert row == r"| command | `a\|b --x '<i>'` &lt;script> |"


def test_a_card_plays_what_travels_with_the_pipeline(hub, small, tmp_path):
    """Saved elsewhere, pushed and saved again: sounds go along, and a card links only what is there."""
    folder = tmp_path / "from"
    pipe = tonefield.load(small["mel"])
    pipe.save_pretrained(folder)
    (folder / "samples").mkdir()
    (folder / "samples" / "a b.wav").write_bytes(b"RIFF of a sound")
    (folder / "samples" / "all.png").write_bytes(b"\x89PNG of a picture")
    (tmp_path / "secret.wav").write_bytes(b"RIFF of a secret")
    (folder / "samples" / "link.wav").symlink_to(tmp_path / "secret.wav")
    outside = [
        "../secret.wav",
        str(tmp_path / "secret.wav"),
        "samples/link.wav",
        "samples/gone.wav",
        "model_index.json",
    ]
    shown = [("samples/a b.wav", HOSTILE), ("samples/all.png", "all"), *((path, "x") for path in outside)]
    pipe.register_to_config(card={"samples": shown})
    pipe.save_pretrained(folder)
    assert "(samples/all.png)" in (folder / "README.md").read_text()

    tonefield.load(folder).push_to_hub("someone/sounds")
    files = hub.files["models", "someone/sounds"]
    assert {name for name in files if name.endswith((".wav", ".png"))} == {"samples/a b.wav", "samples/all.png"}
    card = check_players(hub, "models", "someone/sounds")
    assert "samples/a%20b.wav" in card and "<script" not in card and "secret" not in card
    assert card.count("<audio") == card.count("</audio>") == 1

    fetched = tonefield.load("someone/sounds")  # which brings no sounds along, so that a copy can show none
    fetched.save_pretrained(tmp_path / "copy")
    assert "<audio" not in (tmp_path / "copy" / "README.md").read_text()


def test_cards_of_training_play_the_last_validation(hub, mels, tmp_path):
    flags = ("--push_to_hub", "--hub_model_id=someone/x", "--max_train_steps=2", "--validation_steps=1")
    train(tmp_path / "out", mels, *flags, "--num_validation_samples=2")
    card = check_players(hub, "models", "someone/x", at_least=2)
    assert re.findall(r"^\| (\w+) \| <audio.*step-0000002-(\d)\.wav", card, re.MULTILINE) == [
        ("high", "0"),
        ("low", "1"),
    ]
    local = (tmp_path / "out" / "README.md").read_text()
    for address in re.findall(r'src="([^"]+)"', local):
        assert (tmp_path / "out" / address).is_file()
    assert CARD_MARK in local and os.sep + "tmp" not in card


# ----- datasets


@pytest.fixture
def odd_sounds(tmp_path):
    """Recordings of two classes, one of which is called what no card can bear."""
    sounds = make_sounds(tmp_path / "sounds", per_class=3)
    (sounds / "high").rename(sounds / "<script>|`x`")
    return sounds


def build(kind, sounds, folder, *flags):
    flags = (*flags, "--previews=3", "--push_to_hub=someone/data")
    if kind == "tokens":
        return tokenize(sounds, "mulaw", folder, "--validation_fraction=0.4", *flags)
    return make_dataset(sounds, folder, *flags)


@pytest.mark.parametrize("kind", ["mels", "tokens"])
def test_datasets_show_what_they_hold(hub, odd_sounds, tmp_path, kind, monkeypatch):
    folder = build(kind, odd_sounds, tmp_path / "data")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    card = check_players(hub, "datasets", "someone/data", at_least=3)
    assert "| classes (label) | &#60;script&#62;&#124;&#96;x&#96;, low |" in card
    assert "<script" not in card.split("---\n", 2)[2]
    here = datasets.load_from_disk(str(folder))
    assert f"| rows | {len(here['train'])} train, {len(here['validation'])} validation |" in card
    (command,) = re.findall(r"^\| command \| `(.*)` \|$", card, re.MULTILINE)
    maker = audio_to_tokens if kind == "tokens" else audio_to_images
    assert command.split()[:2] == ["python", f"audio_to_{'tokens' if kind == 'tokens' else 'images'}.py"]
    args = maker.parse_args(shlex.split(command)[2:])
    assert (args.input_dir, args.previews, args.push_to_hub) == ("sounds", 3, None)
    assert args.validation_fraction == (0.4 if kind == "tokens" else 0.2)
    there = datasets.load_dataset("someone/data")
    assert {name: split[:] for name, split in there.items()} == {name: split[:] for name, split in here.items()}

    # Pushed again, the same; a card that a person has written stays, with the metadata up to date.
    before = dict(hub.files["datasets", "someone/data"])
    publish_dataset(folder, "someone/data")
    assert hub.files["datasets", "someone/data"] == before
    hub.files["datasets", "someone/data"]["README.md"] = b"---\nlicense: mit\n---\nMy words.\n"
    publish_dataset(folder, "someone/data")
    mine = hub.files["datasets", "someone/data"]["README.md"].decode()
    assert mine.endswith("My words.\n") and "license: mit" in mine and "dataset_info:" in mine


def test_a_dataset_of_a_dataset_keeps_its_licence(hub, odd_sounds, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    files = sorted(odd_sounds.rglob("*.wav"))
    rows = {"audio": [{"bytes": file.read_bytes(), "path": file.name} for file in files]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "clips.parquet")
    hub.files["datasets", "someone/clips"] = {"train.parquet": (tmp_path / "clips.parquet").read_bytes()}
    hub.licenses["datasets", "someone/clips"] = "cc-by-sa-4.0"
    argv = ["--dataset_name=someone/clips", f"--output_dir={tmp_path / 'data'}", "--sample_rate=4000", "--num_proc=1"]
    argv += ["--resolution=16,16", "--n_fft=512", "--hop_length=256", "--push_to_hub=someone/data"]
    audio_to_images.main(audio_to_images.parse_args(argv))
    card = hub.files["datasets", "someone/data"]["README.md"].decode()
    assert "license: cc-by-sa-4.0" in card and "| license | cc-by-sa-4.0 |" in card and "someone/clips" in card


@pytest.mark.parametrize(("place", "fault"), [("/large/", "drop"), ("/commit/", 503), ("preupload", 500)])
def test_a_dataset_whose_push_breaks_off_can_be_pushed_again(hub, odd_sounds, tmp_path, place, fault):
    hub.fault = lambda request: fault if place in request else None
    with pytest.raises(
        UserError, match=r"dataset is complete in .*data, but could not be pushed to someone/data"
    ) as error:
        build("mels", odd_sounds, tmp_path / "data", "--hub_private_repo")
    assert "\n" not in str(error.value)
    hub.fault = lambda request: None
    (call,) = re.findall(r"Try again with (tonefield\..*)$", str(error.value))
    hub.files.clear()
    hub.private.clear()
    exec(call, {"tonefield": tonefield})
    check_players(hub, "datasets", "someone/data", at_least=3)
    assert ("datasets", "someone/data") in hub.private


# ----- the models that come along


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-poisson-flow", "digits-latent-text", "digits-tokens"])
def test_the_models_that_come_along_are_pushed_whole(hub, name, tmp_path):
    """With card, licence and sounds; and diffusers loads them from there where tonefield is not installed."""
    pipe = tonefield.load(ROOT / "pretrained" / name)
    pipe.push_to_hub(f"someone/{name}")
    files = hub.files["models", f"someone/{name}"]
    card = check_players(hub, "models", f"someone/{name}", at_least=8)
    assert "license: cc-by-sa-4.0" in card and "by Zohar Jackson and others" in card and "judged right" in card
    for file in (ROOT / "pretrained" / name / "samples").iterdir():
        assert files[f"samples/{file.name}"] == file.read_bytes()
    pipe.set_progress_bar_config(disable=True)
    told = '"jackson says seven"' if "text" in name else 'class_labels="seven"'
    call = f"pipe({told}, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).audios"
    code = f"""
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path not in ("", {str(ROOT)!r})]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
assert importlib.util.find_spec("tonefield") is None
import numpy, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("someone/{name}", trust_remote_code=True)
numpy.save("sound.npy", {call})
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= hub.environment(tmp_path / "bare") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sound = eval(call, {"pipe": pipe, "torch": torch})
    assert abs(np.load(tmp_path / "sound.npy") - sound).max() < 1e-5


@pytest.mark.parametrize("name", ["digits-poisson-flow", "digits-latent-text", "digits-tokens"])
def test_cards_that_come_along_show_what_is_there(name):
    folder = ROOT / "pretrained" / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r'(?:src="|\]\()(samples/[^")]+)[")]', card)
    assert sorted(shown) == sorted(f"samples/{file.name}" for file in (folder / "samples").iterdir())
    samples = json.loads((folder / "model_index.json").read_text())["card"]["samples"]
    assert [path for path, _ in samples] == shown
