"""
Every pipeline and every trainer on a device that is not there (see `elsewhere.py`): the same numbers as without it,
all tensors where they belong, no float64 on MPS, and no host that waits for the device within a loop.
"""

import copy
import functools

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from elsewhere import Far, elsewhere
from exact_networks import quiet
from small_pipes import SMALL, shaken, small_mel
from small_t5 import small_text_encoder, small_tokenizer
from token_networks import random_token_pipe
from token_runs import TINY, flags_of, make_codec, motifs, tokenize, write_sounds
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_runs import RECIPE, ROOT, reset_accelerate

from tonefield import (
    LatentAudioDiffusionPipeline,
    MelPFGMPipeline,
    PoissonFlowScheduler,
    ScoreEntropyScheduler,
    ScoreSDEScheduler,
    train_sedd,
    train_unet,
    train_vae,
)
from tonefield.schedulers import poisson_field
from tonefield.schedulers.scheduling_score_entropy import T_SAMPLINGS, placed
from tonefield.train_unet import OBJECTIVES
from tonefield.training import loop


BLOCKS = dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, add_attention=False)


def network(out_channels=1, **config):
    torch.manual_seed(0)
    return shaken(UNet2DModel(**SMALL | {"out_channels": out_channels}, **BLOCKS, **config))


def mel_pipe(scheduler):
    field = scheduler.config.get("prediction_type") == "field"
    return quiet(MelPFGMPipeline(network(1 + field, num_class_embeds=3), scheduler, small_mel()))


@functools.cache  # the trainer of a tokenizer orders its words anew each time
def words():
    tokenizer = small_tokenizer(["rain on the roof", "wind in the trees"])
    return tokenizer, small_text_encoder(tokenizer)


def text_pipe(scheduler):
    torch.manual_seed(0)
    vae = shaken(AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=4, norm_num_groups=4,
        sample_size=16,
    ))  # fmt: skip
    unet = shaken(UNet2DConditionModel(
        **SMALL | {"in_channels": 4, "out_channels": 4, "sample_size": (8, 8)}, cross_attention_dim=16,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], attention_head_dim=2,
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    ))  # fmt: skip
    parts = copy.deepcopy([unet, scheduler, small_mel(), vae, *words()])  # the words must not move to the device
    return quiet(LatentAudioDiffusionPipeline(*parts))


def token_pipe(**law):
    pipe = random_token_pipe(num_classes=2, graph_type=law.get("graph_type", "absorb"))
    symbols = pipe.scheduler.config.vocab_size
    return quiet(type(pipe)(pipe.transformer, ScoreEntropyScheduler(symbols, **law), pipe.audio_tokenizer))


def sound():
    mel = small_mel()
    return 0.3 * torch.sin(torch.arange(mel.slice_samples) / 5)


GUIDED = dict(class_labels=[0, 1], guidance_scale=2.0)
HALF = (torch.arange(16) < 8).tolist()
POISSON = [
    dict(solver_type=solver, aug_dim=aug_dim)
    for solver, aug_dim in (("dpmsolver++", 128), ("heun", None), ("euler", 1), ("rk45", 128))
]
POISSON += [dict(prediction_type="field", aug_dim=1), dict(prior_radius_quantile=0.9, sigma_schedule="exponential")]
SDES = [dict(sde=sde, solver_type=solver, beta_max=3.0) for sde in ("ve", "vp", "subvp") for solver in ("pc", "heun")]
SDES += [
    dict(corrector="langevin", beta_max=3.0),
    dict(corrector="ald", predictor="euler_maruyama", beta_max=3.0),
    dict(solver_type="rk45"),
]
OTHERS = ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler",
          "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]  # fmt: skip
UNCLIPPED = {name: {"clip_sample": False} for name in ("DDIMScheduler", "DDPMScheduler")}
LAWS = [dict(predictor=name) for name in ("event", "analytic", "euler", "remdm", "confidence")]
LAWS += [dict(parameterization="score", predictor=name) for name in ("analytic", "euler")]
LAWS += [dict(graph_type="uniform", predictor=name) for name in ("analytic", "euler")]
LAWS += [dict(graph_type="uniform", parameterization="score"), dict(temperature=0.8, top_k=9, top_p=0.9)]

CASES = {
    **{f"mel {law}": (lambda law=law: mel_pipe(PoissonFlowScheduler(**law)), GUIDED) for law in POISSON},
    **{f"mel {law}": (lambda law=law: mel_pipe(ScoreSDEScheduler(**law)), GUIDED) for law in SDES},
    "mel EDM": (lambda: mel_pipe(diffusers.EDMEulerScheduler()), GUIDED),
    "mel, mask": (lambda: mel_pipe(PoissonFlowScheduler()), dict(audio=sound(), mask=HALF, class_labels=1)),
    "mel, variation": (lambda: mel_pipe(ScoreSDEScheduler(beta_max=3.0)), dict(audio=sound(), strength=0.6)),
    "mel, loop": (lambda: mel_pipe(PoissonFlowScheduler()), dict(loop=True)),
    "text poisson": (lambda: text_pipe(PoissonFlowScheduler()), dict(prompt="rain on the roof")),
    **{
        f"text {name}": (
            lambda name=name: text_pipe(getattr(diffusers, name)(**UNCLIPPED.get(name, {}))),
            dict(prompt="wind in the trees"),
        )
        for name in OTHERS
    },
    "text, mask": (lambda: text_pipe(PoissonFlowScheduler()), dict(prompt="rain", audio=sound(), mask=HALF)),
    "text, long": (
        lambda: text_pipe(diffusers.DDIMScheduler(clip_sample=False)),
        dict(prompt="rain", audio_length_in_s=0.6),
    ),
    **{f"tokens {law}": (lambda law=law: token_pipe(**law), GUIDED | dict(num_frames=8)) for law in LAWS},
}


def generate(pipe, call, device="cpu", watch=lambda: None):
    """What a pipeline makes with generators of a device, which draw what those of the processor draw."""

    def callback(_pipe, _step, _timestep, values):
        watch()
        return values

    count = len(call["class_labels"]) if isinstance(call.get("class_labels"), list) else 1
    seeds = [torch.Generator(device).manual_seed(seed) for seed in range(count)]
    return pipe(**call, num_inference_steps=4, generator=seeds, output_type="pt", callback_on_step_end=callback)


def made(result):
    """Tokens, or mels: the Griffin-Lim algorithm that follows makes much of a last digit."""
    return result.tokens if "tokens" in result else result.mels


# The like of which another case has seen
RARE_PIPES = {f"mel {law}" for law in SDES if law.get("solver_type") == "heun" and law["sde"] != "ve"}
RARE_PIPES |= {f"text {name}" for name in ("PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler")}
RARE_TRAININGS = {
    "unet ve",
    "unet subvp",
    "unet v_prediction",
    "unet, D = 1",
    "unet vp",
    "sedd uniform",
    "sedd importance",
}


def most(cases, rare):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in rare else []) for name in cases]


@pytest.mark.parametrize("name", most(CASES, RARE_PIPES))
def test_a_pipeline_elsewhere(name):
    make, call = CASES[name]
    expected = generate(make(), call)
    waits = []
    with elsewhere("cuda") as place:
        result = generate(make().to("cuda"), call, "cuda", lambda: waits.append(len(place.waits)))
        assert isinstance(result.audios, Far)
        assert torch.equal(result.audios.cpu(), expected.audios)
    assert waits[0] > 0  # for what is given, which comes from the processor
    assert set(place.waits[waits[0] : waits[-1]]) == set()

    with elsewhere("mps"):  # with generators of the processor, for those of MPS draw other numbers
        result = generate(make().to("mps"), call)
        assert isinstance(result.audios, Far)
        torch.testing.assert_close(made(result).cpu(), made(expected), rtol=0, atol=1e-5)


# ----- training


class Enough(Exception):
    """Training has come as far as the test wants to see."""


def first_steps(script, flags, device, monkeypatch, place=None, count=3):
    """The weights after `count` optimizer steps of a trainer on a device, and the waits between the first and last."""
    waits, weights = [], []

    def after_step(optimizer, *_):
        waits.append(len(place.waits) if place else 0)
        if len(waits) == count:
            parameters = [value for group in optimizer.param_groups for value in group["params"]]
            weights.extend(value.detach().cpu().clone() for value in parameters)
            raise Enough

    def make_accelerator(args):
        accelerator = loop_of_old(args)
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = torch.device(device)
        return accelerator

    loop_of_old = loop.make_accelerator
    monkeypatch.setattr(loop, "make_accelerator", make_accelerator)
    hook = register_optimizer_step_post_hook(after_step)
    reset_accelerate()
    try:
        with pytest.raises(Enough):
            script.main(script.parse_args([*flags, "--logging_steps=1000", "--checkpointing_steps=1000"]))
    finally:
        hook.remove()
        monkeypatch.undo()
        reset_accelerate()
    return weights, [] if place is None else place.waits[waits[0] : waits[-1]]


def mel_flags(*flags, recipe=RECIPE):
    return [f"--config={recipe}", "--gradient_accumulation_steps=1", "--max_train_steps=9", *flags]


VAE_RECIPE = ROOT / "recipes" / "test-tiny-vae.yaml"
TOKEN_FLAGS = ["--gradient_accumulation_steps=1", "--max_train_steps=9"]
TRAININGS = {
    **{
        f"unet {name}": (train_unet, mel_flags(f"--objective={name}", "--num_inference_steps=30"))
        for name in OBJECTIVES
    },
    "unet, D = 1": (train_unet, mel_flags("--aug_dim=1")),
    "vae": (train_vae, mel_flags("--discriminator_start=0", "--latent_dims=8,8", recipe=VAE_RECIPE)),
    **{f"sedd {name}": (train_sedd, [*TOKEN_FLAGS, f"--t_sampling={name}"]) for name in T_SAMPLINGS},
    "sedd, the uniform graph": (train_sedd, [*TOKEN_FLAGS, "--graph_type=uniform"]),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A dataset of codes in two classes, of two lengths, and a network for it."""
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    (folder / "network.yaml").write_text(TINY)
    sounds = write_sounds(folder / "sounds", {"a": motifs(0, 8, rng), "b": motifs(1, 8, rng, repeats=3)})
    return tokenize(sounds, make_codec(folder / "codec"), folder / "data"), folder / "network.yaml"


@pytest.mark.parametrize("name", most(TRAININGS, RARE_TRAININGS))
def test_training_elsewhere(name, mels, tokens, tmp_path, monkeypatch):
    script, flags = TRAININGS[name]
    if script is train_sedd:
        flags = flags_of(tmp_path, tokens[0], f"--model_config={tokens[1]}", *flags)
    else:
        flags = [*flags, f"--dataset_name={mels}", f"--output_dir={tmp_path}"]
    expected, _ = first_steps(script, flags, "cpu", monkeypatch)
    with elsewhere("cuda") as place:
        weights, waits = first_steps(script, flags, "cuda", monkeypatch, place)
    assert set(waits) == set()
    assert len(weights) == len(expected) > 10
    for ours, theirs in zip(weights, expected, strict=True):  # AdamW of another device adds in another order
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with elsewhere("mps") as place:
        weights, _ = first_steps(script, flags, "mps", monkeypatch, place)
    for ours, theirs in zip(weights, expected, strict=True):
        assert ours.isfinite().all() and ours.shape == theirs.shape


def test_draws_stay_below_one_without_float64():
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert largest.float() == 1  # which would be a token past the last
    with elsewhere("mps"):
        moved = placed(largest, torch.device("mps", 0))
        assert isinstance(moved, Far)
        assert moved.cpu() == 1 - 2**-24


def test_the_field_does_without_float64_on_mps():
    x, data = torch.randn(3, 40), torch.randn(7, 40)
    sigma = torch.tensor([0.1, 1.0, 5.0])
    expected = poisson_field(x, data, sigma, 1, 5.0)
    with elsewhere("mps"):
        found = poisson_field(x.to("mps"), data.to("mps"), sigma.to("mps"), 1, 5.0)
        assert all(isinstance(part, Far) for part in found)
        assert all(torch.equal(part.cpu(), other) for part, other in zip(found, expected, strict=True))
