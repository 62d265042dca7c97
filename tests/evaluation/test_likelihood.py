"""Likelihoods against closed forms and enumerated laws, from sounds to the numbers that are printed."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from diffusers import DDIMScheduler, UNet2DModel
from exact_networks import GaussianDenoiser, GaussianNoise, noise_of, quiet
from token_networks import exact_table, random_table, random_token_pipe

import tonefield
import tonefield.evaluate as script
from tonefield import (
    LatentAudioDiffusionPipeline,
    MelPFGMPipeline,
    MelSpectrogram,
    MuLawTokenizer,
    PoissonFlowScheduler,
    ScoreEntropyScheduler,
    ScoreSDEScheduler,
    SEDDTokenPipeline,
)
from tonefield.command_line import UserError
from tonefield.data.loading import load_split, read_record
from tonefield.evaluation.likelihood import (
    kind_of,
    measure,
    negative_log_likelihoods,
    per_unit,
    pieces_of_rows,
    pieces_of_sounds,
)


RATE = 4000


def small_mel(**changes):
    return MelSpectrogram(**dict(sample_rate=RATE, n_fft=256, hop_length=128, n_mels=8, num_frames=8) | changes)


def sounds(*lengths):
    rng = np.random.default_rng(0)
    return [(0.1 * rng.normal(size=length)).astype(np.float32) for length in lengths]


def test_bits_per_dimension_of_a_gaussian():
    mel = small_mel(mean=-0.3, std=0.4)
    scheduler = PoissonFlowScheduler(aug_dim=None, prediction_type="sample", sigma_max=200)
    pipe = quiet(MelPFGMPipeline(GaussianDenoiser(0.5, sample_size=(8, 8)), scheduler, mel))
    given = sounds(2500, 1023, 700)
    pieces, owners = pieces_of_sounds(pipe, given)
    assert owners == [0, 0, 0, 1, 2] and {piece.shape for piece in pieces} == {(1, 8, 8)}
    law = torch.distributions.Normal(0.0, math.sqrt(0.25 + 0.002**2))
    expected = [-law.log_prob(piece.double()).sum().item() for piece in pieces]
    nats, sizes = negative_log_likelihoods(pipe, pieces, batch_size=2, tolerance=1e-5)
    assert nats == pytest.approx(expected, abs=0.02) and sizes.tolist() == [64] * 5
    result = measure(pipe, pieces, owners, None, tolerance=1e-5)
    assert result["bits_per_dimension"] == pytest.approx(sum(expected) / 320 / math.log(2), abs=1e-3)
    assert result["nats_per_dimension"] == pytest.approx(sum(expected) / 320, abs=1e-3)
    of_first = sum(expected[:3]) / 192 / math.log(2)
    assert result["bits_per_dimension_of_each"][0] == pytest.approx(of_first, abs=1e-3)
    assert result["dimensions"] == 320 and result["recordings"] == 3 and result["pieces"] == 5
    low, high = result["interval_bits"]
    assert low < result["bits_per_dimension"] < high


@pytest.mark.parametrize("sde", ["ve", "vp"])
def test_score_sdes(sde):
    scheduler = ScoreSDEScheduler(sde=sde, solver_type="heun", **({"sampling_eps": 1e-5} if sde == "ve" else {}))
    network = GaussianNoise(0.5, sample_size=(8, 8))
    network.marginal = noise_of(scheduler)
    pipe = quiet(MelPFGMPipeline(network, scheduler, small_mel()))
    pieces, _ = pieces_of_sounds(pipe, sounds(1000, 1000))
    mean, std = scheduler.equation.marginal(torch.tensor(scheduler.config.sampling_eps).double())
    law = torch.distributions.Normal(0.0, math.sqrt(0.25 * mean.item() ** 2 + std.item() ** 2))
    expected = [-law.log_prob(piece.double()).sum().item() for piece in pieces]
    assert negative_log_likelihoods(pipe, pieces)[0] == pytest.approx(expected, abs=0.02)


def table_pipe(books=1, frames=3, classes=1, **config):
    table = random_table(3, books * frames, classes)
    config = dict(num_codebooks=books, num_classes=classes if classes > 1 else None, max_length=frames) | config
    codec = MuLawTokenizer(sampling_rate=10, hop_length=books, mu=2)
    transformer = exact_table(table, 3, **config)
    return quiet(SEDDTokenPipeline(transformer, ScoreEntropyScheduler(vocab_size=3), codec)), table


@pytest.mark.parametrize(("books", "frames"), [(1, 3), (2, 2)])
def test_the_bound_of_an_exact_network_is_the_likelihood(books, frames):
    pipe, table = table_pipe(books, frames)
    codes = torch.tensor([[2, 0, 1, 1][:frames], [1, 0, 2, 2][:frames]][:books])
    index = int("".join(map(str, codes.flatten().tolist())), 3)
    nats, sizes = negative_log_likelihoods(pipe, [codes] * 40, num_draws=60, batch_size=40)
    assert sizes.tolist() == [books * frames] * 40
    assert nats.mean() == pytest.approx(-math.log(table[0, index]), abs=4 * nats.std() / math.sqrt(40))
    assert nats.std() < 0.4


def test_classes_change_the_likelihood():
    pipe, table = table_pipe(frames=2, classes=2)
    codes = torch.tensor([[2, 1]])
    for labels, row in ([[0] * 40], table[0]), ([[1] * 40], table[1]), ([None], table.mean(0)):
        nats, _ = negative_log_likelihoods(pipe, [codes] * 40, labels[0], num_draws=60, batch_size=40)
        assert nats.mean() == pytest.approx(-math.log(row[7]), abs=0.02)
    result = measure(pipe, [codes] * 40, [0] * 20 + [1] * 20, [0, 1], num_draws=60, batch_size=40)
    expected = [-math.log2(row[7]) / 2 for row in table]
    assert result["bits_per_token_of_each"] == pytest.approx(expected, abs=0.02)


def test_tokens_of_sounds_are_cut_into_windows():
    pipe, _ = table_pipe(frames=3)
    pieces, owners = pieces_of_sounds(pipe, sounds(7, 3))
    assert [tuple(piece.shape) for piece in pieces] == [(1, 3), (1, 3), (1, 1), (1, 3)] and owners == [0, 0, 0, 1]
    with torch.no_grad():
        law = quiet(random_token_pipe(hop=2, seed=1))
    pieces, owners = pieces_of_sounds(law, sounds(300, 90))
    result = measure(law, pieces, owners, None, num_draws=4)
    assert result["tokens"] == 300 + 90 and result["kind"].startswith("an upper bound")
    assert result["bits_per_token"] == pytest.approx(result["nats_per_token"] / math.log(2))
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))
    assert result["bits_per_second"] == pytest.approx(result["bits_per_token"] * 8000)  # two of 256 for two samples


def test_chance_belongs_to_the_piece():
    pipe = random_token_pipe(hop=2)
    pieces, _ = pieces_of_sounds(pipe, sounds(100, 100, 60, 100))
    together, _ = negative_log_likelihoods(pipe, pieces, num_draws=3, batch_size=4)
    alone, _ = negative_log_likelihoods(pipe, pieces, num_draws=3, batch_size=1)
    assert together == pytest.approx(alone, rel=1e-5)
    other, _ = negative_log_likelihoods(pipe, pieces, num_draws=3, seed=1)
    assert not np.allclose(together, other, rtol=1e-5)


def test_the_ratio_and_its_interval():
    ratio, interval, each = per_unit(np.array([6.0, 2.0, 3.0]), np.array([4, 4, 2]), [0, 0, 1])
    assert ratio == 1.1 and each.tolist() == [1.0, 1.5]
    # residuals 8 - 8.8 and 3 - 2.2: variance 1.28, standard error of the mean sqrt(1.28 / 2), over 5 a recording
    assert interval[1] - 1.1 == pytest.approx(1.96 * math.sqrt(0.64) / 5)
    assert per_unit(np.array([1.0]), np.array([2]), [0])[1] is None
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        counts = rng.integers(5, 30, size=60)
        low, high = per_unit(counts * 2.0 + np.sqrt(counts) * rng.normal(size=60), counts, list(range(60)))[1]
        hits += low < 2 < high
    assert 0.91 < hits / 300 < 0.98


# The command


def run(capsys, *flags):
    script.main(script.parse_args(["likelihood", *map(str, flags), "--device=cpu"]))
    return capsys.readouterr()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for index, sound in enumerate(sounds(2000, 1500, 3000)):
        (folder / ("low", "high")[index % 2]).mkdir(exist_ok=True)
        soundfile.write(folder / ("low", "high")[index % 2] / f"{index}.wav", sound, RATE)
    (folder / "low" / "broken.wav").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    blocks = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
    blocks |= dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    unet = UNet2DModel((8, 8), 1, 1, num_class_embeds=3, add_attention=False, **blocks)
    pipe = MelPFGMPipeline(unet, PoissonFlowScheduler(), small_mel(mean=-0.4, std=0.5), label2id={"low": 0, "high": 1})
    pipe.save_pretrained(root / "mels")
    random_token_pipe(hop=4).save_pretrained(root / "tokens")
    unet = UNet2DModel((8, 8), 1, 1, add_attention=False, **blocks)
    LatentAudioDiffusionPipeline(unet, DDIMScheduler(), small_mel()).save_pretrained(root / "latent")
    return root


def test_the_command_on_mels(recordings, models, tmp_path, capsys):
    out = tmp_path / "new" / "nll.json"
    printed = run(capsys, "--model", models / "mels", "--input_dir", recordings, "--out", out, "--tolerance", 1e-2)
    assert "given their classes (label)" in printed.out and "bits per dimension (95 % interval" in printed.out
    assert "left out: low/broken.wav" in printed.err
    report = json.loads(out.read_text())
    assert report["names"] == ["high/1.wav", "low/0.wav", "low/2.wav"] and report["recordings"] == 3
    assert report["pieces"] == 2 + 2 + 3 and report["dimensions"] == 7 * 64
    assert report["settings"]["tolerance"] == 1e-2
    without = run(capsys, "--model", models / "mels", "--input_dir", recordings, "--label_column=", "--tolerance=1e-2")
    assert "without classes" in without.out and without.out.splitlines()[1] != printed.out.splitlines()[1]
    few = run(capsys, "--model", models / "mels", "--input_dir", recordings, "--max_samples=1", "--tolerance=1e-2")
    assert "2 pieces" in few.out and "interval" not in few.out


def test_the_command_on_tokens(recordings, models, capsys):
    printed = run(capsys, "--model", models / "tokens", "--input_dir", recordings, "--num_draws", 2)
    assert "at most " in printed.out and "bits per token" in printed.out and "perplexity" in printed.out
    assert "resampled to 8000 Hz" in printed.out
    more = run(capsys, "--model", models / "tokens", "--input_dir", recordings, "--num_draws", 3)
    assert more.out != printed.out


def test_datasets_of_mels_and_tokens(recordings, models, tmp_path, capsys):
    from tonefield import audio_to_images, audio_to_tokens

    source_folder = tmp_path / "sounds"
    for path in recordings.rglob("[0-9].wav"):
        (source_folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (source_folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    flags = [
        f"--sample_rate={RATE}",
        "--resolution=8,8",
        "--n_fft=256",
        "--hop_length=128",
        "--num_proc=1",
        "--validation_fraction=0",
    ]
    source = [f"--input_dir={source_folder}", f"--output_dir={tmp_path / 'mels'}"]
    audio_to_images.main(audio_to_images.parse_args([*source, *flags]))
    pipe, rows = tonefield.load(models / "mels"), load_split(str(tmp_path / "mels")).with_format("numpy")
    stored, owners = pieces_of_rows(pipe, rows, read_record(rows.features), "mels")
    heard, _ = pieces_of_sounds(
        pipe, [soundfile.read(path, dtype="float32")[0] for path in sorted(source_folder.rglob("*.wav"))]
    )
    assert owners == list(range(7)) and len(heard) == 7
    for piece in heard:  # float16 in the dataset
        assert min((piece - other).abs().max() for other in stored) < 1e-3
    options = ["--split=train", "--tolerance=1e-2"]
    printed = run(capsys, "--model", models / "mels", "--dataset_name", tmp_path / "mels", *options)
    assert "given their classes" in printed.out and "7 pieces" in printed.out

    codec = random_token_pipe(hop=4).audio_tokenizer
    codec.save_pretrained(tmp_path / "codec")
    source = [f"--input_dir={source_folder}", f"--output_dir={tmp_path / 'tokens'}", "--num_proc=1"]
    audio_to_tokens.main(audio_to_tokens.parse_args([*source, f"--codec={tmp_path / 'codec'}"]))
    printed = run(capsys, "--model", models / "tokens", "--dataset_name", tmp_path / "tokens", "--split=train",
                  "--num_draws=2")  # fmt: skip
    assert "bits per token" in printed.out
    with pytest.raises(UserError, match="holds tokens, but the model was made for mels"):
        run(capsys, "--model", models / "mels", "--dataset_name", tmp_path / "tokens", "--split=train")
    flags[0] = "--sample_rate=3000"
    source = [f"--input_dir={source_folder}", f"--output_dir={tmp_path / 'other'}"]
    audio_to_images.main(audio_to_images.parse_args([*source, *flags]))
    with pytest.raises(UserError, match=r"was made by a front end .*, but the model sees sounds through"):
        run(capsys, "--model", models / "mels", "--dataset_name", tmp_path / "other", "--split=train")


def test_errors_are_one_line(recordings, models, tmp_path, capsys):
    def refused(*flags, message):
        with pytest.raises(UserError, match=message) as error:
            run(capsys, *flags)
        assert "\n" not in str(error.value)

    refused("--model", models / "mels", message="Give --input_dir or --dataset_name")
    refused("--model", tmp_path, "--input_dir", recordings, message="--model .* cannot be used")
    refused("--model", models / "mels", "--input_dir", tmp_path / "no", message="--input_dir .* does not exist")
    refused("--model", models / "mels", "--input_dir", recordings, "--num_draws=0", message="--num_draws must be pos")
    refused("--model", models / "mels", "--input_dir", recordings, "--out", tmp_path, message="is a folder")
    refused("--model", models / "latent", "--input_dir", recordings, message="LatentAudioDiffusionPipeline has no lik")
    (tmp_path / "up").mkdir()
    (tmp_path / "down").mkdir()
    for name in ("up", "down"):
        soundfile.write(tmp_path / name / "1.wav", np.zeros(500), RATE)
    refused("--model", models / "mels", "--input_dir", tmp_path, message="'down' of --label_column label is not one")
    with pytest.raises(ValueError, match="without a mel has no likelihood of sounds"):
        kind_of(MelPFGMPipeline(GaussianDenoiser(0.5), PoissonFlowScheduler()))
