"""`--push_to_hub`, against a Hub on this machine: what arrives there, and what is refused before any training."""

import json
import os
import re
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
from fake_hub import TOKEN
from training_runs import RECIPE, train

import tonefield
from tonefield import train_unet
from tonefield.command_line import UserError
from tonefield.hub import license_of
from tonefield.training.publishing import training_facts


NAME = "someone/two-tones"


def test_what_is_pushed_is_whole(hub, mels, tmp_path, capsys, monkeypatch):
    flags = ("--max_train_steps=3", "--max_train_samples=8", "--validation_steps=3", "--push_to_hub")
    output = train(tmp_path / "out", mels, *flags, f"--hub_model_id={NAME}", "--hub_private_repo")
    assert f"pushed to {NAME}" in capsys.readouterr().out
    files = hub.files["models", NAME]
    assert ("models", NAME) in hub.private
    wanted = {
        "model_index.json", "README.md", "pipeline_mel_pfgm.py", "scheduler/scheduling_poisson_flow.py",
        "unet/diffusion_pytorch_model.safetensors", "mel/mel_spectrogram.py", "metrics.jsonl",
        "samples/step-0000003.png", "samples/step-0000003-0.wav",
    }  # fmt: skip
    assert wanted <= set(files)
    assert not [name for name in files if "checkpoint" in name or "training.json" in name]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files[weights] == (output / weights).read_bytes()
    assert str(tmp_path).encode() not in b"".join(
        content for name, content in files.items() if name.endswith((".md", ".json", ".jsonl", ".py"))
    )

    # The card tells what there was, and its command is one that the script reads.
    card = files["README.md"].decode()
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", card, re.MULTILINE))
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert rows["dataset"] == mels.name
    assert (rows["optimizer steps"], rows["samples per step"], rows["classes"]) == ("3", "8", "high, low")
    assert float(rows["training loss"]) == pytest.approx(logged[-2]["loss"], rel=1e-3)
    assert float(rows["validation loss"]) == pytest.approx(logged[-1]["validation_loss"], rel=1e-3)
    words = rows["command"].strip("`").split()
    assert words[:2] == ["python", "train_unet.py"]
    args = train_unet.parse_args(words[2:])
    recipe = [f"--config={RECIPE}", f"--dataset_name={mels.name}", *flags[:3]]
    local = {"config": None, "push_to_hub": False}
    assert vars(args) == vars(train_unet.parse_args(recipe)) | local

    # And it loads: by the snippet of the card.
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert f'tonefield.load("{NAME}")' in snippet and "pipe(class_labels='high', num_inference_steps=3)" in snippet
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert names["pipe"].config.label2id == {"high": 0, "low": 1}
    assert (tmp_path / "sound.wav").stat().st_size > 1000


def test_what_forbids_a_push_is_known_before_training(hub, mels, tmp_path, monkeypatch):
    hub.files["models", "other/model"] = {}
    hub.read_only.add(("models", "other/model"))

    def refused(message, name=NAME):
        with pytest.raises(UserError, match=f"^--push_to_hub {message}") as error:
            train(tmp_path / "out", mels, "--push_to_hub", f"--hub_model_id={name}")
        assert "\n" not in str(error.value)
        assert not [name for name in os.listdir(tmp_path / "out") if not name.startswith(".")]

    refused("cannot write to other/model: .*403", "other/model")
    refused("cannot write to a b: Repo id must", "a b")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("cannot write to someone/two-tones: .*401")
    monkeypatch.delenv("HF_TOKEN")
    refused("needs a token of the Hub: run `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("cannot write to someone/two-tones: .*offline mode is enabled")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    refused("cannot write to someone/two-tones: .*[Cc]onnect")
    assert ("models", NAME) not in hub.files


def test_no_empty_repository_is_left_behind(hub, mels, tmp_path):
    """What else is refused before the training is refused before the repository is made."""
    for flags in (("--model_config={norm_num_groups: 5}",), ("--train_split=other",)):
        with pytest.raises(UserError):
            train(tmp_path / "out", mels, "--push_to_hub", f"--hub_model_id={NAME}", *flags)
        assert not hub.files


def test_a_push_that_fails_loses_nothing(hub, mels, tmp_path):
    """The Hub takes the permission back while the model is trained."""
    hub.on_auth_check = lambda: hub.read_only.add(("models", NAME))
    with pytest.raises(UserError, match=r"out, but was not pushed: .*403.*Try again with") as error:
        train(tmp_path / "out", mels, "--push_to_hub", f"--hub_model_id={NAME}", "--max_train_steps=1")
    pipe = tonefield.load(tmp_path / "out")
    hub.read_only.clear()
    (call,) = re.findall(r"Try again with (tonefield\..*)\.$", str(error.value))
    exec(call, {"tonefield": tonefield})
    assert hub.files["models", NAME]["model_index.json"] == (tmp_path / "out" / "model_index.json").read_bytes()
    assert pipe.config.label2id == {"high": 0, "low": 1}


def test_datasets_of_the_hub_are_linked(hub, monkeypatch):
    hub.files["datasets", "someone/sounds"] = {"README.md": b""}
    hub.licenses["datasets", "someone/sounds"] = "cc-by-4.0"
    assert license_of("someone/sounds") == "cc-by-4.0"
    assert license_of("someone/nothing") is None
    args = train_unet.parse_args(["--dataset_name=someone/sounds", "--aug_dim=inf", "--no-use_ema", "--max_hours=2"])
    defaults = train_unet.parse_args(["--dataset_name=none"])
    facts = training_facts("train_unet.py", args, defaults, SimpleNamespace(num_processes=2))
    assert (facts["datasets"], facts["dataset license"]) == (["someone/sounds"], "cc-by-4.0")
    launch = (
        "accelerate launch --num_processes 2 train_unet.py --dataset_name someone/sounds --no-use_ema --aug_dim inf"
    )
    assert sorted(facts["command"].strip("`").split()) == sorted(launch.split())
