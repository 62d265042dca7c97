"""The script as a whole: it learns, it resumes bit for bit, every flag does something, and what it refuses."""

import json
import shutil

import datasets
import numpy as np
import pytest
import soundfile
import torch
from fake_hub import check_players
from safetensors.torch import load_file
from training_runs import ROOT, TINY_CODEC, make_sounds, reset_accelerate

from tonefield import train_codec
from tonefield.command_line import UserError
from tonefield.models import FSQCodec, load_audio_tokenizer
from tonefield.training.checkpoints import WEIGHTS
from tonefield.training.recordings import Recordings


QUICK = (
    "--train_batch_size=2", "--gradient_accumulation_steps=2", "--crop_seconds=0.25", "--max_train_steps=4",
    "--lr_warmup_steps=2", "--lr_scheduler=cosine", "--learning_rate=0.002", "--ema_max_decay=0.9",
    "--validation_steps=0", "--num_validation_samples=2", "--logging_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return make_sounds(tmp_path_factory.mktemp("sounds"), per_class=5, seconds=0.5)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "codec.yaml"
    path.write_text(TINY_CODEC)
    return path


@pytest.fixture(scope="module")
def train(sounds, config):
    def train(output, *flags, source=f"--input_dir={sounds}"):
        reset_accelerate()
        argv = [source, f"--codec_config={config}", f"--output_dir={output}", *QUICK, *flags]
        train_codec.main(train_codec.parse_args(argv))
        return output

    return train


@pytest.fixture(scope="module")
def usual(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("usual"), "--checkpointing_steps=2")


def weights(folder):
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / WEIGHTS).items())])


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_result_is_a_codec(usual):
    codec = load_audio_tokenizer(usual)
    assert (type(codec), codec.sampling_rate, codec.hop_length, codec.codebook_size) == (FSQCodec, 4000, 40, 25)
    torch.testing.assert_close(weights(usual), weights(usual / "checkpoint-4" / "codec_ema"), rtol=0, atol=0)
    assert not torch.equal(weights(usual), weights(usual / "checkpoint-4" / "codec"))
    assert codec.decode(codec.encode(torch.zeros(1, 100), 4000)).shape == (1, 120)
    assert "codes" in (usual / "README.md").read_text()
    assert json.loads((usual / "training.json").read_text())["codec"]["levels"] == [5, 5]
    assert not (usual / ".audio").exists()


def test_it_learns(train, tmp_path):
    """What is measured on recordings that it has never heard improves."""
    flags = ("--max_train_steps=24", "--validation_steps=4", "--logging_steps=4", "--lr_scheduler=constant")
    flags += ("--gradient_accumulation_steps=1", "--learning_rate=0.02", "--validation_fraction=0.2")
    rows = logged(train(tmp_path, *flags, "--num_validation_samples=0"))
    for name in ("mel_distance_db", "spectral_distance_db", "validation_loss"):
        values = [row[name] for row in rows if name in row]
        assert values[-1] < (0.93 if name == "mel_distance_db" else 0.99) * values[0], name
    assert not (tmp_path / "samples").exists()


def test_what_is_measured(usual, train, sounds):
    """Each number from the files, by the definition in the help."""
    codec = load_audio_tokenizer(usual)
    files = sorted(sounds.rglob("*.wav"))[:3]
    sounds = [np.float32(soundfile.read(path)[0]) for path in files]
    held_out = Recordings(np.concatenate(sounds), np.cumsum([len(sound) for sound in sounds]), [str(f) for f in files])
    mel = train_codec.make_mel(4000)
    values, pairs = train_codec.measure(codec, held_out, mel)
    expected = {"si_sdr_db": [], "mel_distance_db": [], "code_perplexity": []}
    for sound, (target, made) in zip(sounds, pairs, strict=True):
        np.testing.assert_allclose(target, sound, atol=1e-7)
        codes = codec.encode(target[None], 4000)
        torch.testing.assert_close(codec.decode(codes)[0, : len(sound)], made, rtol=1e-4, atol=1e-6)
        x, y = target.double().numpy(), made.double().numpy()
        scaled = x * (x @ y) / (x @ x)
        expected["si_sdr_db"].append(10 * np.log10(scaled @ scaled / ((y - scaled) @ (y - scaled))))
        difference = mel.encode(target[None]) - mel.encode(made[None])
        expected["mel_distance_db"].append(40 * difference.abs().mean().item())  # 80 dB lie between -1 and 1
        expected["code_perplexity"].append(codes)
    shares = torch.cat(expected.pop("code_perplexity"), 2).flatten().bincount().double()
    shares = shares[shares > 0] / shares.sum()
    assert values["code_perplexity"] == pytest.approx((-shares * shares.log()).sum().exp().item())
    for name, numbers in expected.items():
        assert values[name] == pytest.approx(np.mean(numbers), rel=1e-4), name


def test_resuming_is_exact(usual, train, tmp_path):
    shutil.copytree(usual / "checkpoint-2", tmp_path / "checkpoint-2")
    train(tmp_path, "--resume_from_checkpoint=latest")
    for name in ("codec", "codec_ema"):
        ours, theirs = (weights(folder / "checkpoint-4" / name) for folder in (tmp_path, usual))
        assert torch.equal(ours, theirs)
    moments = [
        torch.load(folder / "checkpoint-4" / "optimizer.bin", weights_only=True) for folder in (tmp_path, usual)
    ]
    for index, state in moments[0]["state"].items():
        assert torch.equal(state["exp_avg_sq"], moments[1]["state"][index]["exp_avg_sq"])
    assert not torch.equal(weights(usual / "checkpoint-2" / "codec"), weights(usual / "checkpoint-4" / "codec"))


def test_what_is_shown(train, tmp_path):
    train(tmp_path, "--validation_steps=4", "--max_validation_samples=1", "--validation_fraction=0.5")
    (row,) = (row for row in logged(tmp_path) if "si_sdr_db" in row)
    assert set(row) == {"step", "si_sdr_db", "spectral_distance_db", "mel_distance_db", "code_perplexity"}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "original-0.wav", "step-0000004-0.wav", "step-0000004.png"
    }  # fmt: skip
    original, rate = soundfile.read(tmp_path / "samples" / "original-0.wav")
    made, _ = soundfile.read(tmp_path / "samples" / "step-0000004-0.wav")
    assert (rate, len(original)) == (4000, len(made))


@pytest.mark.parametrize(
    "flag",
    ["--seed=1", "--crop_seconds=0.5", "--waveform_weight=0", "--max_train_samples=2", "--validation_steps=9",
     "--mixed_precision=bf16"],
)  # fmt: skip
def test_flags_change_the_training(usual, train, tmp_path, flag):
    assert not torch.equal(weights(train(tmp_path, flag)), weights(usual))


def test_flags_change_nothing(usual, train, tmp_path):
    folder = train(tmp_path, "--dataloader_num_workers=1", "--checkpointing_steps=1", "--checkpoints_total_limit=1")
    assert torch.equal(weights(folder), weights(usual))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_dataset_is_as_good_as_a_folder(usual, train, sounds, tmp_path):
    files = sorted(sounds.rglob("*.wav"))
    rows = [{"sound": {"bytes": path.read_bytes(), "path": None}} for path in files]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "data")
    source = f"--dataset_name={tmp_path / 'data'}"
    folder = train(tmp_path / "out", "--audio_column=sound", source=source)
    assert torch.equal(weights(folder), weights(usual))
    with pytest.raises(UserError, match=r"no split 'validation'; it has train. .--validation_steps 0 does without"):
        train(tmp_path / "more", "--audio_column=sound", "--validation_steps=2", source=source)
    with pytest.raises(UserError, match="has no column 'audio'; its columns are sound"):
        train(tmp_path / "more", source=source)


def test_presets_and_configurations(tmp_path):
    def made(*flags):
        return train_codec.make_codec(train_codec.parse_args(["--input_dir=x", *flags]))

    assert made().sampling_rate == 24000
    digits = made("--preset=digits-8k")
    assert (digits.sampling_rate, digits.codebook_size) == (8000, 1000)
    (tmp_path / "c.json").write_text('{"num_codebooks": 2, "_class_name": "FSQCodec"}')
    assert made("--preset=digits-8k", f"--codec_config={tmp_path / 'c.json'}").num_codebooks == 2
    for content, message in {
        "[1]": "must consist of the arguments of FSQCodec",
        "depth: 3": "cannot be built: .*'depth'",
        "n_fft: 81": "cannot be built: n_fft must be even",
        "a: [": "cannot be read",
    }.items():
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            made(f"--codec_config={tmp_path / 'bad.yaml'}")
    with pytest.raises(UserError, match="no codec preset 'opera'; the presets are"):
        made("--preset=opera")


def test_the_recipe_is_read():
    args = train_codec.parse_args([f"--config={ROOT / 'recipes' / 'fsdd-codec-cpu.yaml'}", "--input_dir=x"])
    assert train_codec.make_codec(args).sampling_rate == 8000


def test_test_switch(train, sounds, tmp_path, capsys):
    train(tmp_path, "--test", "--validation_steps=1000")
    output = capsys.readouterr().out
    assert "step 4: si_sdr_db" in output
    assert "9 recordings of" in output


def test_what_is_pushed_is_whole(train, hub, tmp_path):
    folder = train(tmp_path / "out", "--push_to_hub", "--hub_model_id=someone/codec", "--validation_steps=4")
    card = check_players(hub, "models", "someone/codec", at_least=2)
    assert card.index("original-0.wav") < card.index("step-0000004-0.wav")
    assert "| held out: mel distance |" in card and "python train_codec.py --input_dir" in card
    files = hub.files["models", "someone/codec"]
    assert not [name for name in files if "checkpoint" in name or name == "training.json"]
    assert load_audio_tokenizer("someone/codec").fingerprint() == load_audio_tokenizer(folder).fingerprint()


def test_what_forbids_a_push_is_known_before_training(train, tmp_path):
    with pytest.raises(UserError, match="--push_to_hub"):
        train(tmp_path, "--push_to_hub", "--hub_model_id=someone/codec", "--max_train_steps=1")
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--dataset_name is needed"),
        (("--input_dir=x", "--dataset_name=y"), "give --input_dir or --dataset_name, one of them"),
        (("--input_dir=x", "--streaming"), "--streaming is for a --dataset_name"),
        (("--input_dir=x", "--validation_fraction=1"), "--validation_fraction lies between 0 and 1, not at 1"),
        (("--input_dir=x", "--crop_seconds=0"), "--crop_seconds must be positive, not 0"),
        (("--input_dir=x", "--waveform_weight=-1"), "--waveform_weight is at least 0, not -1"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train_codec.parse_args(list(flags))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_recordings(train, usual, sounds, tmp_path):
    def refused(message, folder, *flags, output=tmp_path / "out"):
        with pytest.raises(UserError, match=message):
            train(output, *flags, source=f"--input_dir={folder}")

    refused("nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("There are no recordings in .*empty", tmp_path / "empty")
    soundfile.write(tmp_path / "empty" / "still.wav", np.zeros(100), 4000)
    refused("None of 1 recordings can be used; still.wav is silent", tmp_path / "empty")
    refused("has one recording, of which none can be held out", tmp_path / "empty", "--validation_steps=1")
    shutil.copytree(usual / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    refused("has checkpoints of an earlier run", sounds, output=tmp_path / "run")
    resume = "--resume_from_checkpoint=latest"
    refused("with sample shape .*they must be equal", sounds, resume, "--crop_seconds=1", output=tmp_path / "run")
    refused("with recordings .*they must be equal", sounds, resume, "--max_train_samples=3", output=tmp_path / "run")


def test_short_recordings_are_enough(train, tmp_path):
    (tmp_path / "short").mkdir()
    for index in range(3):
        soundfile.write(tmp_path / "short" / f"{index}.wav", 0.1 * np.sin(np.arange(50 + index)), 4000)
    folder = train(tmp_path / "out", "--validation_steps=4", source=f"--input_dir={tmp_path / 'short'}")
    assert all(np.isfinite(value) for row in logged(folder) for value in row.values())
