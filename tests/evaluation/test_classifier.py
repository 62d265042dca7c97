"""The classifier: splits, calibration, training in one command, and what the class metrics make of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, ClassLabel, Dataset
from scipy.special import log_softmax

import tonefield.evaluate as script
from tonefield.command_line import UserError
from tonefield.evaluation import AudioSet, SoundClassifier, evaluate, frechet_distance, load_embedding
from tonefield.evaluation.classifier import ClassifierLogits, load_sound_classifier
from tonefield.evaluation.posteriors import load_posterior_model, log_posteriors
from tonefield.evaluation.statistics import GaussianStats
from tonefield.evaluation.train_classifier import (
    augment,
    calibrate,
    hold_out_of_classes,
    hold_out_speakers,
    of_recordings,
)


ROOT = Path(__file__).resolve().parents[2]
RATE = 4000
SPEAKERS = ("ann", "bob", "cat")


def sound(kind, speaker, rng, seconds=0.4):
    """Noise, a tone, or a chirp; each speaker has a pitch."""
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = 300 * (1 + 0.2 * SPEAKERS.index(speaker)) * rng.uniform(0.97, 1.03)
    waves = {
        "noise": lambda: rng.normal(size=len(time)),
        "tone": lambda: np.sin(2 * np.pi * pitch * time),
        "chirp": lambda: np.sin(2 * np.pi * (pitch * time + 900 * time**2)),
    }
    return 0.2 * waves[kind]() * np.exp(-time * rng.uniform(0, 5)) + 1e-3 * rng.normal(size=len(time))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Files without folders, whose classes and speakers a metadata.csv tells; two cannot be used."""
    folder, rng = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    rows = ["file_name,label,speaker"]
    for kind in ("noise", "tone", "chirp"):
        for index in range(18):
            speaker = SPEAKERS[index % 3]
            name = f"{kind}_{speaker}_{index}.wav"
            soundfile.write(folder / name, sound(kind, speaker, rng, rng.uniform(0.2, 0.5)), RATE)
            rows.append(f"{name},{kind},{speaker}")
    (folder / "broken.wav").write_bytes(b"nothing")
    (folder / "metadata.csv").write_text("\n".join([*rows, "broken.wav,tone,ann"]))
    soundfile.write(folder / "nameless.wav", np.ones(100), RATE)
    return folder


def train(*flags):
    script.main(script.parse_args(["train-classifier", *map(str, flags), "--device=cpu"]))


QUICK = ("--num_epochs=8", "--batch_size=16", "--learning_rate=0.01", "--validation_fraction=0.2")


@pytest.fixture(scope="module")
def trained(recordings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "classifier"
    train("--input_dir", recordings, "--output_dir", folder, *QUICK)
    return folder


# Parts


def test_of_each_class_the_same_share_is_held_out():
    labels = np.repeat([0, 1, 2], [50, 10, 2])
    held = hold_out_of_classes(labels, 0.1, seed=0)
    assert [int(held[labels == label].sum()) for label in range(3)] == [5, 1, 1]
    assert np.array_equal(held, hold_out_of_classes(labels, 0.1, seed=0))
    assert not np.array_equal(held, hold_out_of_classes(labels, 0.1, seed=1))


def test_speakers_are_held_out_as_a_whole():
    speakers = [SPEAKERS[index % 3] for index in range(30)]
    held = hold_out_speakers(speakers, 0.1, seed=0)
    assert held.sum() == 10 and len({s for s, out in zip(speakers, held, strict=True) if out}) == 1
    assert hold_out_speakers(speakers, 0.4, seed=0).sum() == 20
    assert hold_out_speakers(speakers, 0.99, seed=0).sum() == 20  # never all of them


def test_calibration_finds_the_temperature_of_known_logits():
    rng = np.random.default_rng(0)
    truth = 2 * rng.normal(size=(20000, 5))
    labels = (log_softmax(truth, axis=1) + rng.gumbel(size=truth.shape)).argmax(1)  # drawn from the softmax
    assert calibrate(2.5 * truth, np.arange(20000), labels) == pytest.approx(2.5, rel=0.03)
    assert calibrate(0.4 * truth, np.arange(20000), labels) == pytest.approx(0.4, rel=0.03)


def test_few_recordings_are_no_reason_for_certainty():
    def temperature(n):
        labels = np.arange(n) % 5
        return calibrate(8 * np.eye(5)[labels], np.arange(n), labels)  # all of them are recognised

    # The best probability of the right class is (n + 1/5) / (n + 1)
    for n in (20, 200):
        p = (n + 0.2) / (n + 1)
        assert temperature(n) == pytest.approx(8 / np.log(4 * p / (1 - p)), rel=1e-3)
    assert temperature(20) > temperature(200)


def test_pieces_of_a_recording_are_averaged():
    logits = np.random.default_rng(0).normal(size=(5, 3))
    p = np.exp(log_softmax(logits / 1.7, axis=1))
    expected = np.log([p[:2].mean(0), p[2], p[3:].mean(0)])
    assert np.allclose(of_recordings(logits, np.array([0, 0, 4, 7, 7]), 1.7), expected)


def test_augmentation():
    mels = torch.full((64, 1, 20, 40), -1.0)
    mels[:, :, 5] = 0.2  # a steady tone
    generator = torch.Generator().manual_seed(0)
    same = augment(mels, 0.0, 0.0, generator)
    assert same.min() >= -1 and same.max() <= 0.2 + 1e-5
    assert (same[:, 0, 6:] < -0.99).all() and (same[:, 0, :5] < -0.99).all()  # no other band sounds
    assert ((same[:, 0, 5] > 0.19).any(1)).float().mean() > 0.75  # the band is wiped out in some
    moved = augment(mels, 0.3, 0.0, generator)[:, 0].amax(2).argmax(1)
    # Band b is read at stretch * (b + 1/2) - 1/2: the lowest bands stay
    assert set(moved.tolist()) > {4, 5, 6} and moved.max() <= 9
    low = torch.full((64, 1, 20, 40), -1.0)
    low[:, :, 0] = 0.2
    assert (augment(low, 0.3, 0.0, generator)[:, 0].amax(2).argmax(1) == 0).all()
    shifted = augment(mels, 0.0, 0.05, generator)[:, 0]
    assert (shifted[:, 10:] == -1).all()  # silence is not made louder
    louder = shifted.amax((1, 2))
    assert louder.max() > 0.4 and louder.min() < 0.0 and louder.max() <= 0.2 + 6 * 0.05 + 1e-5


def test_a_classifier_of_known_weights(tmp_path):
    mel = dict(sample_rate=RATE, n_fft=256, hop_length=64, n_mels=16, num_frames=16, mean=-0.5, std=0.3)
    torch.manual_seed(0)
    model = SoundClassifier(["a", "b", "c"], mel, widths=(4, 6), temperature=2.0, card={"accuracy": 0.5}).eval()
    waveform = 0.1 * torch.randn(2, 800)
    output = model(waveform)
    x = model.front_end.encode(torch.nn.functional.pad(waveform, (0, model.front_end.slice_samples - 800)))
    for convolution, norm in ((model.body[0], model.body[1]), (model.body[4], model.body[5])):
        x = torch.nn.functional.conv2d(x, convolution.weight, padding=1)
        x = torch.nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
        x = torch.nn.functional.max_pool2d(x, 2, ceil_mode=True)
    features = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
    torch.testing.assert_close(output.features, features)
    torch.testing.assert_close(output.logits, model.head(features) / 2)
    model.save_pretrained(tmp_path)
    assert {"config.json", "diffusion_pytorch_model.safetensors"} == {path.name for path in tmp_path.iterdir()}
    loaded = load_sound_classifier(str(tmp_path))
    torch.testing.assert_close(loaded(waveform).logits, output.logits)
    before = ClassifierLogits(str(tmp_path)).fingerprint()
    assert ClassifierLogits(str(tmp_path)).fingerprint() == before
    model.register_to_config(temperature=3.0)
    model.save_pretrained(tmp_path)
    assert ClassifierLogits(str(tmp_path)).fingerprint() != before  # kept logits are not those of another temperature
    assert loaded.labels == ["a", "b", "c"] and loaded.config.card == {"accuracy": 0.5}
    assert loaded.front_end.config.mean == -0.5
    with pytest.raises(ValueError, match="A waveform has 5000 samples, but the classifier sees 1023"):
        model(torch.zeros(1, 5000))
    with pytest.raises(ValueError, match="two different names or more"):
        SoundClassifier(["a", "a"], mel)


# The command


def test_the_command(recordings, tmp_path, capsys):
    train("--input_dir", recordings, "--output_dir", tmp_path / "c", *QUICK, "--num_epochs=1", "--min_accuracy=1.01")
    printed = capsys.readouterr()
    assert "54 recordings of 3 classes (18 to 18 each)" in printed.out
    assert "accuracy on speakers never heard (" in printed.out and "accuracy on held-out recordings: " in printed.out
    assert (
        "left out: broken.wav cannot be read" in printed.err and "left out: nameless.wav has no class" in printed.err
    )
    assert "warning: this is below 101%" in printed.err
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["labels"] == ["chirp", "noise", "tone"] and config["mel"]["sample_rate"] == RATE
    assert config["card"]["recordings"] == 42 and config["card"]["held_out_recordings"] == 12
    assert len(config["card"]["unheard_speakers"]) == 1 and config["temperature"] != 1
    assert set(config["card"]["held_out"]) == {"is", "log_mis", "confidence"}
    flags = json.loads((tmp_path / "c" / "training.json").read_text())["flags"]
    assert flags["num_epochs"] == 1 and flags["seed"] == 0


def test_it_learns(trained):
    card = load_sound_classifier(str(trained)).config.card
    assert card["accuracy"] >= 0.9 and card["accuracy_unheard_speakers"] >= 0.7
    assert card["held_out"]["is"] > 2


def test_columns_of_a_dataset(recordings, tmp_path, capsys):
    names = ["noise", "tone", "chirp"]
    paths = sorted(recordings.glob("*_*.wav"))
    kinds = [path.name.split("_")[0] for path in paths]
    rows = [{"path": path.name, "bytes": path.read_bytes()} for path in paths]
    data = Dataset.from_dict({"sound": rows, "kind": [names.index(kind) for kind in kinds]})
    data = data.cast_column("sound", Audio(decode=False)).cast_column("kind", ClassLabel(names=names))
    data.save_to_disk(tmp_path / "data")
    train("--dataset_name", tmp_path / "data", "--audio_column=sound", "--label_column=kind", "--num_epochs=1",
          "--output_dir", tmp_path / "c", "--sampling_rate=2000", "--seconds=0.3", "--seed=3")  # fmt: skip
    printed = capsys.readouterr().out
    assert "54 recordings of 3 classes" in printed and "never heard" not in printed
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["labels"] == ["chirp", "noise", "tone"] and config["mel"]["sample_rate"] == 2000
    assert config["mel"]["num_frames"] == 1 + np.ceil(0.3 * 2000 / config["mel"]["hop_length"])


def test_errors_are_one_line(recordings, tmp_path, capsys):
    def refused(*flags, message):
        with pytest.raises(UserError, match=message) as error:
            train("--output_dir", tmp_path / "out", *flags)
        assert "\n" not in str(error.value)

    given = ("--input_dir", recordings)
    refused(message="Give --input_dir or --dataset_name, one of them")
    refused(*given, "--validation_fraction=1", message="--validation_fraction lies between 0 and 1, not at 1")
    refused(*given, "--num_epochs=0", message="--num_epochs must be positive, not 0")
    refused(*given, "--frequency_warp=0.7", message="--frequency_warp lies between")
    refused(*given, "--label_column=genre", message="no column 'genre' of classes; it has label, speaker")
    refused("--input_dir", tmp_path / "no", message="--input_dir .* does not exist")
    refused("--dataset_name", tmp_path / "no", message="cannot be loaded")
    (tmp_path / "x").mkdir()
    soundfile.write(tmp_path / "x" / "1.wav", np.ones(100), RATE)
    refused("--input_dir", tmp_path, message="has no column 'label' of classes; .*Make a sub-folder for each class")
    for name in ("y", "z"):
        (tmp_path / name).mkdir()
        for index in range(1 if name == "y" else 8):
            soundfile.write(tmp_path / name / f"{index}.wav", np.ones(100), RATE)
    soundfile.write(tmp_path / "x" / "2.wav", np.ones(100), RATE)
    refused("--input_dir", tmp_path, message="The class 'y' has one recording")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"):
        train(*given, "--output_dir", tmp_path / "file")


def test_help_is_quick_and_teaches():
    code = "import sys; from tonefield import evaluate\ntry: evaluate.parse_args([sys.argv[1], '--help'])\n"
    code += "finally: print(sorted({'torch', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules)))"
    for command in ("train-classifier", "likelihood", "images", "sampling"):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", code, command], capture_output=True, text=True, env=environment, cwd=ROOT
        )
        assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]", result.stderr
        assert f"evaluate.py {command} --" in result.stdout


# What metrics make of it


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Sounds in folders of the class that was wanted; a quarter of the tones are noise."""
    folder, rng = tmp_path_factory.mktemp("generated"), np.random.default_rng(5)
    for kind in ("noise", "tone", "chirp"):
        (folder / kind).mkdir()
        for index in range(12):
            made = "noise" if kind == "tone" and index < 3 else kind
            soundfile.write(folder / kind / f"{index}.wav", sound(made, SPEAKERS[index % 3], rng), RATE)
    return folder


def test_class_metrics_in_reports(trained, generated, recordings):
    names = ["accuracy", "confidence", "is", "log_mis", "am"]
    report = evaluate(recordings, generated, names, classifier=str(trained), device="cpu")
    results = {result["metric"]: result for result in report["results"]}
    made = AudioSet.open(generated)
    log_p = log_posteriors(made.embed(load_posterior_model(str(trained), "cpu")))
    assert log_p.shape == (36, 3) and np.allclose(np.exp(log_p).sum(1), 1)

    accuracy = results["accuracy"]
    wanted = np.array([["chirp", "noise", "tone"].index(sample.name.split("/")[0]) for sample in made.samples])
    assert accuracy["value"] == np.mean(log_p.argmax(1) == wanted)
    assert 0.8 < accuracy["value"] <= 33 / 36 + 1e-9
    assert np.sum(accuracy["confusion"]) == 36 and accuracy["confusion"][2][1] >= 2  # tones that are noise
    assert accuracy["interval"][0] < accuracy["value"] < accuracy["interval"][1]
    assert accuracy["held_out_recordings"] == accuracy["classifier_accuracy"] >= 0.9
    p = np.exp(log_p)
    assert results["is"]["value"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert results["confidence"]["value"] == pytest.approx(p.max(1).mean())
    assert 1.5 < results["is"]["value"] < 3 and results["is"]["held_out_recordings"] > 2
    real = np.exp(log_posteriors(AudioSet.open(recordings).embed(load_posterior_model(str(trained), "cpu"))))
    am = (real.mean(0) * np.log(real.mean(0) / p.mean(0))).sum() - (p * np.log(p)).sum(1).mean()
    assert results["am"]["value"] == pytest.approx(am)
    for name in names[1:]:
        low, high = results[name]["interval"]
        assert low <= results[name]["value"] <= high


def test_features_of_the_classifier_are_an_embedding(trained, generated, recordings):
    embedding = f"classifier={trained}"
    report = evaluate(recordings, generated, ["fad", "kid", "ndb"], [embedding], device="cpu", bootstrap=0)
    values = {result["metric"]: result for result in report["results"]}
    model = load_sound_classifier(str(trained))

    def features(folder):
        rows = []
        for path in sorted(folder.rglob("*.wav")):
            if path.name in ("broken.wav",):
                continue
            waveform = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            with torch.no_grad():
                rows.append(model(model.front_end.slices(waveform)[:1]).features)
        return GaussianStats.of(torch.cat(rows).numpy())

    # These sounds are single pieces: each file is one row
    expected = frechet_distance(features(recordings), features(generated))
    assert values["fad"]["value"] == pytest.approx(expected, rel=1e-4)
    assert values["ndb"]["bins"] == 2 and values["ndb"]["clips"] == [55, 36]
    assert load_embedding(embedding).dim == 256
    with pytest.raises(UserError, match="Name the folder of the classifier"):
        load_embedding("classifier")


def test_noise_is_further_than_real_sounds(trained, recordings, tmp_path):
    rng = np.random.default_rng(9)
    for name, level in (("clean", 0), ("noisy", 0.1), ("silent", None)):
        (tmp_path / name).mkdir()
        for index in range(24):
            kind = ("noise", "tone", "chirp")[index % 3]
            made = sound(kind, SPEAKERS[index // 3 % 3], rng)
            made = 0 * made if level is None else made + level * rng.normal(size=len(made))
            soundfile.write(tmp_path / name / f"{kind}_{index}.wav", made, RATE)

    def measured(name):
        report = evaluate(
            recordings, tmp_path / name, ["fad", "accuracy"], [f"classifier={trained}"], device="cpu", bootstrap=0,
            classifier=str(trained),
        )  # fmt: skip
        return [result["value"] for result in report["results"]]

    clean, noisy, silent = measured("clean"), measured("noisy"), measured("silent")
    assert clean[0] < noisy[0] < silent[0]
    assert clean[1] > noisy[1] and clean[1] > silent[1]


def test_a_weak_classifier_is_said_to_be_one(generated, tmp_path):
    mel = dict(sample_rate=RATE, n_fft=256, hop_length=64, n_mels=16, num_frames=16)
    torch.manual_seed(0)
    SoundClassifier(["a", "b"], mel, card={"accuracy": 0.6}).save_pretrained(tmp_path / "c")
    result = evaluate([], generated, ["is"], classifier=str(tmp_path / "c"), device="cpu", bootstrap=0)
    assert "is: the classifier knows 60% of held-out recordings only" in result["warnings"]
    with pytest.raises(UserError, match="no file tells for which class it was made, such as chirp/0"):
        evaluate([], generated, ["accuracy"], classifier=str(tmp_path / "c"), device="cpu")
    with pytest.raises(UserError, match=r"is not a classifier that evaluate\.py train-classifier has made"):
        load_embedding(f"classifier={tmp_path}")


# The digits


@pytest.mark.slow
def test_digits(tmp_path, capsys):
    folder = os.environ.get("TONEFIELD_FSDD")
    if not folder:
        pytest.skip("set TONEFIELD_FSDD to a folder of recordings named {digit}_{speaker}_{n}.wav")
    (tmp_path / "digits").mkdir()
    rows = ["file_name,label,speaker"]
    for path in sorted(Path(folder).rglob("*_*_*.wav")):
        digit, speaker, _ = path.stem.split("_")
        os.link(path, tmp_path / "digits" / path.name)
        rows.append(f"{path.name},{digit},{speaker}")
    (tmp_path / "digits" / "metadata.csv").write_text("\n".join(rows))
    train("--input_dir", tmp_path / "digits", "--output_dir", tmp_path / "classifier")
    card = load_sound_classifier(str(tmp_path / "classifier")).config.card
    assert card["accuracy"] >= 0.95
    assert card["accuracy_unheard_speakers"] >= 0.7
    assert card["held_out"]["is"] > 8
