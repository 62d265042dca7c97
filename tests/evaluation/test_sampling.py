"""The sampling benchmark: what it counts, that better solvers score better, and that it serves all pipelines."""

import json

import numpy as np
import pytest
import soundfile
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel, UNet2DModel
from exact_networks import GaussianDenoiser, exact, quiet
from PIL import Image
from small_t5 import small_text_encoder, small_tokenizer
from token_networks import random_token_pipe

import tonefield
import tonefield.evaluate as script
from tonefield import (
    LatentAudioDiffusionPipeline,
    MelPFGMPipeline,
    MelSpectrogram,
    PoissonFlowScheduler,
    ScoreEntropyScheduler,
    ScoreSDEScheduler,
)
from tonefield.command_line import UserError
from tonefield.evaluation import sampling
from tonefield.evaluation.metrics import Options
from tonefield.evaluation.sampling import Calls, benchmark, generate, own_solver, peak_memory, spread, with_solver


RATE = 8000


def small_mel():
    return MelSpectrogram(sample_rate=RATE, n_fft=256, hop_length=64, n_mels=16, num_frames=32)


def small_unet(cls=UNet2DModel, **changes):
    torch.manual_seed(0)
    names = {"UNet2DModel": ("DownBlock2D", "UpBlock2D"), "UNet2DConditionModel": ("CrossAttnDownBlock2D",) * 2}
    down, up = names[cls.__name__][0], names[cls.__name__][1].replace("Down", "Up")
    settings = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
    settings |= dict(down_block_types=(down,) * 2, up_block_types=(up,) * 2)
    return cls((16, 32), 1, 1, **settings | changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    unet = small_unet(num_class_embeds=3, add_attention=False)
    label2id = {"one": 0, "two": 1}
    MelPFGMPipeline(unet, PoissonFlowScheduler(), small_mel(), label2id=label2id).save_pretrained(root / "poisson")
    MelPFGMPipeline(small_unet(add_attention=False), ScoreSDEScheduler("vp"), small_mel()).save_pretrained(
        root / "sde"
    )
    MelPFGMPipeline(small_unet(add_attention=False), PoissonFlowScheduler()).save_pretrained(root / "pictures")
    random_token_pipe(hop=4).save_pretrained(root / "tokens")
    tokenizer = small_tokenizer(["a piano", "a drum"])
    text = dict(tokenizer=tokenizer, text_encoder=small_text_encoder(tokenizer))
    width = text["text_encoder"].config.d_model
    unet = small_unet(UNet2DConditionModel, cross_attention_dim=width, attention_head_dim=4)
    LatentAudioDiffusionPipeline(unet, DDIMScheduler(), small_mel(), **text).save_pretrained(root / "text")
    return root


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("reference"), np.random.default_rng(0)
    for index in range(12):
        soundfile.write(folder / f"{index}.wav", 0.1 * rng.normal(size=2047), RATE)
    return folder


# Parts


@pytest.mark.parametrize(
    ("solver", "steps", "expected"), [("dpmsolver++", 7, 7), ("euler", 7, 7), ("heun", 7, 13), ("rk45", 3, 18)]
)
def test_calls_are_counted(solver, steps, expected):
    pipe = quiet(MelPFGMPipeline(GaussianDenoiser(0.5, sample_size=(16, 32)), PoissonFlowScheduler(), small_mel()))
    pipe.scheduler = with_solver(pipe.scheduler, solver)
    with Calls(pipe.unet) as counted:
        generate(pipe, steps, [{}] * 3, [0, 1, 2], seed=0)
    if solver == "rk45":
        assert expected - 6 < counted.count <= expected
    else:
        assert counted.count == expected
    generate(pipe, steps, [{}], [0], seed=0)
    assert counted.count <= expected  # not counted any more


def test_sounds_depend_on_their_place_alone(models):
    for name in ("poisson", "tokens"):
        pipe = quiet(tonefield.load(models / name))
        together = generate(pipe, 3, [{}] * 4, range(4), seed=5).audios
        alone = generate(pipe, 3, [{}], [2], seed=5).audios
        assert np.allclose(together[2], alone[0], atol=1e-4)
        assert not np.allclose(together[2], generate(pipe, 3, [{}], [2], seed=6).audios[0], atol=1e-4)


def test_solvers_by_name():
    poisson = with_solver(PoissonFlowScheduler(sigma_max=33.0), "heun")
    assert own_solver(poisson) == "heun" and poisson.config.sigma_max == 33
    assert own_solver(with_solver(ScoreSDEScheduler("vp"), "euler")) == "euler"
    tokens = ScoreEntropyScheduler(vocab_size=9)
    assert own_solver(with_solver(tokens, "remdm")) == "remdm" and own_solver(tokens) == "event"
    other = with_solver(DDIMScheduler(beta_end=0.01), "DPMSolverMultistepScheduler")
    assert isinstance(other, DPMSolverMultistepScheduler) and other.config.beta_end == 0.01
    assert own_solver(other) == "DPMSolverMultistepScheduler"
    named = with_solver(DDIMScheduler(), "dpmsolver++")  # as inference.py has it
    assert isinstance(named, DPMSolverMultistepScheduler)
    assert with_solver(tokens, None) is not tokens
    for scheduler, name, message in [
        (poisson, "DDIMScheduler", "DDIMScheduler"),
        (tokens, "heun", "heun"),
        (DDIMScheduler(), "heyn", "heyn does not exist: a network of DDIMScheduler can be sampled with DDIM"),
        (DDIMScheduler(), "VQDiffusionScheduler", "VQDiffusionScheduler is not one"),
    ]:
        with pytest.raises(ValueError, match=message):
            with_solver(scheduler, name)


def test_classes_and_prompts_are_spread(models):
    args = script.parse_args(["sampling", "--model=x", "--output_dir=y", "--num_samples=5"])
    assert [c["class_labels"] for c in spread(tonefield.load(models / "poisson"), args)] == [0, 1, 0, 1, 0]
    args.prompts = ["a", "b"]
    conditions = spread(tonefield.load(models / "text"), args)
    assert [c["prompt"] for c in conditions] == ["a", "b", "a", "b", "a"]
    assert sampling.columns_of(tonefield.load(models / "text"), conditions[:2]) == [{"caption": "a"}, {"caption": "b"}]
    pipe = tonefield.load(models / "poisson")
    assert sampling.columns_of(pipe, [{"class_labels": 1}]) == [{"label": "two"}]


def test_memory_that_was_given_back_is_seen():
    import time

    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as found:
        block = np.ones(2**25)  # 256 MB
        time.sleep(0.1)
        del block
    assert found[0] > before[0] + 200


# The command


def run(capsys, *flags):
    script.main(script.parse_args(["sampling", *map(str, flags), "--device=cpu"]))
    return capsys.readouterr().out


def test_the_grid(models, reference, tmp_path, capsys):
    out = tmp_path / "deep" / "report"
    printed = run(
        capsys, "--model", models / "poisson", "--solvers", "heun", "euler", "--steps", 2, 5, "--num_samples", 10,
        "--batch_size", 4, "--reference", reference, "--metrics", "fad", "kad", "--output_dir", out,
    )  # fmt: skip
    report = json.loads((out / "sampling.json").read_text())
    cells = {(cell["solver"], cell["steps"]): cell for cell in report["cells"]}
    assert {key: cell["calls"] for key, cell in cells.items()} == {
        ("heun", 2): 3, ("heun", 5): 9, ("euler", 2): 2, ("euler", 5): 5
    }  # fmt: skip
    for cell in cells.values():
        assert cell["seconds_per_sound"] == pytest.approx(cell["seconds"] / 10)
        assert cell["real_time_factor"] == pytest.approx(cell["seconds"] / (10 * 2047 / RATE))
        assert cell["memory_mb"] > 50
        assert list(cell["metrics"]) == ["fad", "kad"] and cell["metrics"]["fad"]["interval"]
    lines = printed.splitlines()
    assert lines[0].split() == "solver steps calls s / sound real-time MB fad kad".split() and len(lines) == 6
    assert lines[2].split()[:3] == ["heun", "5", "9"]
    with Image.open(out / "sampling.png") as picture:
        assert picture.width > 2 * picture.height  # three panels
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert report["better"] == {"fad": "lower", "kad": "lower"} and report["pipeline"] == "MelPFGMPipeline"


def test_more_steps_come_nearer(tmp_path):
    """With a network that knows its sounds, only the solver keeps samples from them."""
    mel = small_mel()
    time = torch.arange(mel.slice_samples) / RATE
    tones = 0.5 * torch.sin(2 * torch.pi * torch.tensor([300.0, 500, 900, 1500])[:, None] * time)
    scheduler = PoissonFlowScheduler(aug_dim=None, prediction_type="sample")
    pipe = quiet(MelPFGMPipeline(exact(mel.encode(tones), None), scheduler, mel))
    (tmp_path / "tones").mkdir()
    for index in range(12):
        tone = mel.decode(mel.encode(tones[index % 4 :][:1]), generator=torch.Generator().manual_seed(index))[0]
        soundfile.write(tmp_path / "tones" / f"{index}.wav", tone.numpy(), RATE)
    flags = ["--model=x", "--solvers", "euler", "heun", "--steps", "3", "24", "--num_samples=16", "--metrics=fad"]
    flags += ["--reference", str(tmp_path / "tones"), "--output_dir", str(tmp_path)]
    cells = benchmark(pipe, script.parse_args(["sampling", *flags]), Options(device="cpu"))["cells"]
    fad = {(cell["solver"], cell["steps"]): cell["metrics"]["fad"]["value"] for cell in cells}
    assert fad["heun", 24] == pytest.approx(fad["euler", 24], rel=0.05)  # the same noise leads to the same sounds
    assert 1.3 * fad["heun", 24] < fad["heun", 3] < fad["euler", 3]
    assert json.loads((tmp_path / "sampling.json").read_text())["cells"] == json.loads(json.dumps(cells))


@pytest.mark.parametrize(
    ("model", "solvers", "calls"),
    [
        ("sde", ["euler", "heun"], [4, 7]),
        ("tokens", ["analytic", "confidence"], [4, 4]),
        ("text", ["DDIMScheduler", "DPMSolverMultistepScheduler"], [4, 4]),
    ],
)
def test_all_pipelines(models, tmp_path, capsys, model, solvers, calls):
    flags = ["--prompts", "a piano", "a drum", "--audio_length_in_s=0.25"] if model == "text" else []
    flags += ["--steps=4", "--num_samples=3", "--batch_size=2", "--output_dir", tmp_path]
    printed = run(capsys, "--model", models / model, "--solvers", *solvers, *flags)
    cells = json.loads((tmp_path / "sampling.json").read_text())["cells"]
    assert [cell["solver"] for cell in cells] == solvers and [cell["calls"] for cell in cells] == calls
    assert "metrics" not in cells[0] and (tmp_path / "sampling.png").stat().st_size > 5000
    assert printed.splitlines()[0].split()[-1] == "MB"


def test_what_cannot_be_computed_is_left_out(models, tmp_path, capsys):
    flags = ["--model", str(models / "sde"), "--steps=3", "--num_samples=2", "--output_dir", str(tmp_path)]
    script.main(script.parse_args(["sampling", *flags, "--solvers", "pc", "euler", "--device=cpu"]))
    report = json.loads((tmp_path / "sampling.json").read_text())
    assert [cell["solver"] for cell in report["cells"]] == ["euler"]
    assert "left out: pc, 3 steps: `num_inference_steps` is 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="Nothing of the grid can be computed; pc, 3 steps"):
        script.main(script.parse_args(["sampling", *flags, "--solvers", "pc", "--device=cpu"]))


def test_errors_are_one_line(models, reference, tmp_path, capsys):
    def refused(model, *flags, message):
        with pytest.raises(UserError, match=message) as error:
            run(capsys, "--model", models / model, "--output_dir", tmp_path / "out", *flags)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    refused("poisson", "--steps", "0", message="--steps are at least 1, not 0")
    refused("poisson", "--num_samples=0", message="--num_samples must be positive, not 0")
    refused("poisson", "--metrics=kad", message="kad compares with recordings: name them with --reference")
    refused("poisson", "--metrics=fda", message="There is no metric 'fda'")
    refused("poisson", "--metrics=is", message="is needs --classifier")
    refused("poisson", "--solvers=rk99", message="--solvers rk99: .*rk99")
    refused("text", "--solvers=heyn", message="--solvers heyn: heyn does not exist")
    refused("poisson", "--prompts=a", message="MelPFGMPipeline in .* reads no text")
    refused("poisson", "--audio_length_in_s=3", message="--audio_length_in_s: a MelPFGMPipeline does not take it")
    refused("pictures", message="makes pictures, not sounds")
    refused("nothing", message="--model .* cannot be used")
    refused("poisson", "--reference", tmp_path / "no", message="--reference .* does not exist")
