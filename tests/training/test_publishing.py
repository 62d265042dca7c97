"""`--push_to_hub`, against a Hub on this machine: what arrives there, and what is refused before any training."""

import json
import os
import re
import subprocess
import sys

import pytest
from fake_hub import FakeHub
from training_runs import ROOT, start

from tonefield import train_unet
from tonefield.training.publishing import command


NAME = "someone/two-tones"


def environment(hub, folder, **variables):
    return {**hub.environment(folder / "cache"), "PYTHONPATH": f"{ROOT}", **variables}


def run(code, cwd, variables):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


def ended(process):
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def test_what_is_pushed_is_whole(hub, mels, tmp_path):
    output = tmp_path / "out"
    flags = ("--max_train_steps=3", "--max_train_samples=8", "--validation_steps=3", "--push_to_hub")
    status, printed = ended(
        start(output, mels, *flags, f"--hub_model_id={NAME}", "--hub_private_repo", variables=environment(hub, tmp_path))
    )
    assert status == 0, printed
    assert f"pushed to {NAME}" in printed
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
    recipe = [f"--config={ROOT / 'recipes' / 'test-tiny.yaml'}", f"--dataset_name={mels.name}", *flags[:3]]
    local = {"config": None, "push_to_hub": False}
    assert vars(args) == vars(train_unet.parse_args(recipe)) | local

    # And it loads: by the snippet of the card.
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "tonefield.load" in snippets[1] and 'pipe(class_labels="high")' in snippets[1].replace("'", '"')
    check = "\nassert pipe.config.label2id == {'high': 0, 'low': 1}, pipe.config"
    run(snippets[1] + check, tmp_path, environment(hub, tmp_path))
    assert (tmp_path / "sound.wav").stat().st_size > 1000


def test_what_forbids_a_push_is_known_before_training(hub, mels, tmp_path):
    """Each in a process of its own, all at the same time."""
    hub.files["models", "other/model"] = {}
    hub.read_only.add(("models", "other/model"))
    cases = {
        "needs a token of the Hub: run `hf auth login`": (NAME, {"HF_TOKEN": ""}),
        "cannot write to someone/two-tones: .*401": (NAME, {"HF_TOKEN": "hf_wrong"}),
        "cannot write to other/model: .*403": ("other/model", {}),
        "cannot write to a b: Repo id must": ("a b", {}),
        "cannot write to someone/two-tones: .*offline mode is enabled": (NAME, {"HF_HUB_OFFLINE": "1"}),
        "cannot write to someone/two-tones: .*[Cc]onn": (NAME, {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    }
    for message, (name, variables) in cases.items():
        output = tmp_path / "out"
        flags = ("--max_train_steps=1", "--push_to_hub", f"--hub_model_id={name}")
        status, printed = ended(start(output, mels, *flags, variables=environment(hub, tmp_path, **variables)))
        assert status == 1, printed
        last = printed.splitlines()[-1]
        assert re.search(f"^error: --push_to_hub {message}", last), printed
        assert "Traceback" not in printed
        assert os.listdir(output) == []
    assert ("models", NAME) not in hub.files
