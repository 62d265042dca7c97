"""The pipeline against networks that are exact, and against diffusers' own steps around networks that are not."""

import copy
import math

import diffusers
import numpy as np
import pytest
import torch
from captured_logs import said_by
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    MMAudioVocoder,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from exact_networks import predictor, quiet, seeds

from tonefield import LatentAudioDiffusionPipeline, MelSpectrogram, PoissonFlowScheduler
from tonefield.pipelines import encode_text
from tonefield.pipelines.tonefield_text import logger
from tonefield.pipelines.tonefield_windows import continuations, in_windows, mirrored, window_starts


# A scheduler's default values do not go over to one that is made from its configuration.
BETAS = dict(beta_start=1e-4, beta_end=0.02)
UNCLIPPED = DDIMScheduler(clip_sample=False, **BETAS)
STEPS = dict(num_inference_steps=4)


def rms(x):
    return x.square().mean().sqrt().item()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def clean():
    """Latents of unit variance."""
    return normal(1, 4, 8, 16)


@pytest.fixture
def exact_pipe(mel, vae, clean):
    """A pipeline whose network knows the latents, or the law of their numbers."""

    def make(scheduler=UNCLIPPED, kind="epsilon", mean=clean, spread=0.0, vae=vae, mel=mel):
        return quiet(LatentAudioDiffusionPipeline(predictor(mean, kind, spread), scheduler, mel, vae))

    return make


@pytest.fixture
def mel_pipe(mel):
    """A pipeline without an autoencoder for numbers of a Gaussian law."""

    def make(scheduler=UNCLIPPED, spread=0.3, mean=0.0, **options):
        return quiet(
            LatentAudioDiffusionPipeline(
                predictor(torch.full((1, 1, 1, 1), mean), **options, spread=spread), scheduler, mel
            )
        )

    return make


# Schedulers


SCHEDULERS = """DDIM DDPM DPMSolverMultistep DPMSolverSinglestep EulerDiscrete EulerAncestralDiscrete HeunDiscrete
KDPM2Discrete UniPCMultistep""".split()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_predictor_is_followed(exact_pipe, clean, sounds, name):
    pipe = exact_pipe()
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    call = dict(num_inference_steps=10, output_type="latent", generator=seeds(0, 1))
    for given in ({"num_waveforms_per_prompt": 2}, {"audio": sounds[:2], "strength": 0.5}):
        assert rms(pipe(**given, **call).latents - clean) < 1e-6
    made = pipe(audio=sounds[:2], mask=[(0.1, 0.15)], **call).latents
    assert rms((made - clean)[..., 7:9]) < 1e-6 and rms((made - clean)[..., :5]) > 0.1


@pytest.mark.parametrize(("scheduler", "kind"), [
    (DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), "v_prediction"),
    (DDIMScheduler(clip_sample=False, prediction_type="sample"), "sample"),
    (FlowMatchEulerDiscreteScheduler(), "flow"),
    *((PoissonFlowScheduler(aug_dim=d, prediction_type="sample"), "poisson") for d in (1, 128, None)),
    (PoissonFlowScheduler(aug_dim=None, prediction_type="sample", solver_type="heun"), "poisson"),
])  # fmt: skip
def test_other_predictions(exact_pipe, clean, sounds, scheduler, kind):
    pipe = exact_pipe(scheduler, kind)
    call = dict(num_inference_steps=10, output_type="latent", generator=seeds(0, 1))
    for given in ({"num_waveforms_per_prompt": 2}, {"audio": sounds[:2], "strength": 0.5}):
        assert rms(pipe(**given, **call).latents - clean) < 1e-6


def test_clipping(exact_pipe, mel_pipe, mel, clean):
    """Latents have no range: clipped to [-1, 1], unit variance loses E[(|x| - 1)^2; |x| > 1] = 0.15 of itself."""
    for scheduler in (DDIMScheduler(), DDPMScheduler(), DPMSolverMultistepScheduler(thresholding=True)):
        with pytest.raises(ValueError, match=r"=True, but latents know no range: use pipe.scheduler.from_config"):
            exact_pipe(scheduler)(**STEPS)
    # A scheduler that does not clip may remember that another one did.
    exact_pipe(DPMSolverMultistepScheduler.from_config(DDIMScheduler().config))(output_type="latent", **STEPS)
    data = normal(1, 1, 16, 32, seed=3)
    errors = []
    for clip in (True, False):
        pipe = quiet(LatentAudioDiffusionPipeline(predictor(data), DDIMScheduler(clip_sample=clip), mel))
        errors.append(rms(pipe(num_inference_steps=50, output_type="mel", generator=seeds(0)).mels - data))
    assert abs(errors[0] - 0.388) < 0.03 and errors[1] < 1e-6
    # Mels within [-1, 1] may be clipped, standardised ones reach beyond.
    wide = MelSpectrogram(8000, 256, 64, 16, 32, mean=-0.2, std=0.6)
    with pytest.raises(ValueError, match=r"clip_sample=True, but the mels reach 2"):
        LatentAudioDiffusionPipeline(predictor(data), DDIMScheduler(), wide)(**STEPS)


@pytest.mark.parametrize(("scheduler", "kind", "steps"), [
    (UNCLIPPED, "epsilon", 100), (DDPMScheduler(clip_sample=False), "epsilon", 500),
    (DPMSolverMultistepScheduler(), "epsilon", 40),
    (PoissonFlowScheduler(aug_dim=None, prediction_type="sample"), "poisson", 40),
])  # fmt: skip
def test_samples_have_the_law_of_the_data(exact_pipe, scheduler, kind, steps):
    pipe = exact_pipe(scheduler, kind, torch.full((1, 4, 1, 1), 0.3), 0.7)
    generator = torch.Generator().manual_seed(0)
    numbers = pipe(
        num_waveforms_per_prompt=40, num_inference_steps=steps, output_type="latent", generator=generator
    ).latents
    count = numbers.numel()  # 20480
    assert abs(numbers.mean() - 0.3) < 3 * 0.7 / count**0.5 + 0.002  # and the error of so many steps
    assert abs(numbers.std() - 0.7) < 3 * 0.7 / (2 * count) ** 0.5 + 0.01


def test_a_field_of_several_windows(mel):
    """A PFGM network for each window is the denoiser inside of it, on the whole."""
    torch.manual_seed(0)
    field = UNet2DModel(
        (16, 32), 1, 2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,),
        layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip
    torch.nn.init.constant_(field.conv_out.bias, -2.0)  # the last component of a field is negative
    scheduler = PoissonFlowScheduler(aug_dim=1, prediction_type="field", sigma_max=2.0)
    pipe = quiet(LatentAudioDiffusionPipeline(field, scheduler, mel))
    noise = normal(2, 1, 16, 80)
    made = pipe(latents=noise, num_inference_steps=1, output_type="mel").mels
    x, t = 2 * noise, torch.tensor(2.0).log() / 4

    def denoise(x, row):
        with torch.no_grad():
            return scheduler.precondition_outputs(x, field(x, t).sample, 2.0)

    torch.testing.assert_close(made, in_windows(denoise, x, 32), atol=1e-4, rtol=1e-4)


# Text


def by_hand(pipe, noise, prompts, negative=None, scale=1.0, rescale=0.0, steps=4):
    """Diffusers' own loop, sample by sample and branch by branch, without padding."""
    scheduler, rows = DDIMScheduler.from_config(pipe.scheduler.config), []

    def states(words):
        ids = pipe.tokenizer(words, return_tensors="pt").input_ids
        return pipe.text_encoder(ids).last_hidden_state

    for x, prompt in zip(noise, prompts, strict=True):
        scheduler.set_timesteps(steps)
        x = x[None]
        for t in scheduler.timesteps:
            towards = pipe.unet(x, t, states(prompt)).sample
            without = pipe.unet(x, t, states(negative or "")).sample
            guided = without + scale * (towards - without)
            x = scheduler.step(rescale_noise_cfg(guided, towards, rescale), t, x).prev_sample
        rows.append(x)
    return torch.cat(rows)


@pytest.mark.parametrize(("options", "by_hand_options"), [
    (dict(guidance_scale=1.0), dict(scale=1.0)),
    (dict(guidance_scale=0.0), dict(scale=0.0)),
    (dict(), dict(scale=3.0)),
    (dict(guidance_scale=4.0, negative_prompt="fast drums"), dict(scale=4.0, negative="fast drums")),
    (dict(guidance_scale=7.0, guidance_rescale=0.7), dict(scale=7.0, rescale=0.7)),
])  # fmt: skip
def test_guidance(text_pipe, options, by_hand_options):
    prompts, noise = ["a low tone", "slow piano and bass"], normal(2, 4, 8, 16)
    with torch.no_grad():
        expected = by_hand(text_pipe, noise, prompts, **by_hand_options)
    rows = []
    hook = text_pipe.unet.register_forward_pre_hook(lambda network, inputs: rows.append(len(inputs[0])))
    made = text_pipe(prompts, latents=noise, output_type="latent", **options, **STEPS).latents
    hook.remove()
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert rows == [2 if options.get("guidance_scale", 3) in (0, 1) else 4] * 4  # one branch is enough for one
    assert text_pipe.do_classifier_free_guidance == (options.get("guidance_scale", 3) not in (0, 1))


def test_prompts_matter(text_pipe):
    noise, call = normal(1, 4, 8, 16).repeat(2, 1, 1, 1), dict(output_type="latent", **STEPS)
    made = text_pipe(["a low tone", "drums"], latents=noise, **call).latents
    swapped = text_pipe(["drums", "a low tone"], latents=noise, **call).latents
    torch.testing.assert_close(made, swapped.flip(0), atol=1e-5, rtol=1e-5)
    without = text_pipe(latents=noise, **call).latents
    assert rms(made[0] - made[1]) > 1e-3 and rms(made[0] - without[0]) > 1e-3
    # The null of guidance is the empty prompt.
    torch.testing.assert_close(without, text_pipe("drums", latents=noise, guidance_scale=0, **call).latents)


def test_padding_changes_nothing(text_pipe):
    states, mask = text_pipe.encode_prompt(["a low tone"])
    call = dict(latents=normal(1, 4, 8, 16), output_type="latent", **STEPS)
    expected = text_pipe("a low tone", **call).latents
    for length in (0, 3, 9):
        padded = torch.cat([states, 50 * normal(1, length, 16)], 1)
        tokens = torch.cat([mask, torch.zeros(1, length, dtype=torch.bool)], 1)
        made = text_pipe(prompt_embeds=padded, prompt_attention_mask=tokens, **call).latents
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert rms(text_pipe(prompt_embeds=padded, **call).latents - expected) > 1e-3


def test_encode_text(words):
    prompts = ["a low tone", "", "slow piano and fast drums"]
    states, mask = encode_text(*words, prompts)
    for row, kept, prompt in zip(states, mask, prompts, strict=True):
        ids = words[0](prompt, return_tensors="pt").input_ids
        expected = words[1](ids).last_hidden_state[0].detach()
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert kept.tolist() == [True] * len(expected) + [False] * (len(row) - len(expected))
        assert not row[len(expected) :].any()
    assert mask.sum(1)[1] == 1


def test_prompts_that_are_too_long(words):
    with said_by(logger) as captured:
        encode_text(*words, "slow piano")
        assert captured.getvalue() == ""
        states, _ = encode_text(*words, ["slow piano slow piano slow piano", "a low tone"])
    assert states.shape[1] == 24
    whole = words[0]("slow piano slow piano slow piano").input_ids
    rest = words[0].decode(whole[23:-1])
    assert f"takes 24 tokens; this part of a prompt is cut off: {rest!r}" in captured.getvalue()
    assert len(captured.getvalue().strip().splitlines()) == 1
    torch.testing.assert_close(encode_text(*words, "slow piano", max_length=3)[0].shape[1], 3)


@pytest.mark.parametrize("options", [{}, {"audio_length_in_s": 0.4}, {"loop": True}, {"strength": 0.5}])
def test_every_sound_depends_on_its_own_seed_only(text_pipe, sounds, options):
    audio = sounds[:2] if "strength" in options else None
    prompts = ["a low tone", "slow piano and fast drums"]
    call = dict(num_inference_steps=2, output_type="pt", **options)
    together = text_pipe(prompts, audio=audio, num_waveforms_per_prompt=2, generator=seeds(0, 1, 2, 3), **call)
    for i in (1, 2):
        given = None if audio is None else audio[i // 2]
        alone = text_pipe(prompts[i // 2], audio=given, generator=seeds(i), **call)
        torch.testing.assert_close(alone.mels[0], together.mels[i], atol=1e-3, rtol=1e-3)
        # Looking for phases makes more of what is rounded.
        assert rms(alone.audios[0] - together.audios[i]) < 0.1 * rms(together.audios[i])
    assert rms(together.audios[0] - together.audios[1]) > 0.5 * rms(together.audios[0])


def test_noise_of_one_generator(text_pipe):
    call = dict(num_waveforms_per_prompt=2, output_type="latent", **STEPS)
    made = text_pipe(generator=torch.Generator().manual_seed(0), **call).latents
    torch.testing.assert_close(made, text_pipe(latents=normal(2, 4, 8, 16), **call).latents)


# The autoencoder


def test_latents_are_those_of_the_autoencoder(text_pipe, vae, sounds, mel):
    mels = mel.encode(sounds[:2])
    with torch.no_grad():
        latents = (vae.encode(mels).latent_dist.mode() - 0.1) * 1.3
        decoded = vae.decode(latents / 1.3 + 0.1).sample
    same = text_pipe(audio=sounds[:2], strength=0, output_type="latent").latents
    torch.testing.assert_close(same, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        text_pipe(audio=mels, strength=0, output_type="mel").mels, decoded, atol=1e-4, rtol=1e-4
    )


def test_slicing_and_tiling(text_pipe, vae, sounds, mel):
    call = dict(audio=sounds[:3], strength=0, output_type="mel")
    expected = text_pipe(**call).mels
    vae.enable_slicing()
    torch.testing.assert_close(text_pipe(**call).mels, expected, atol=1e-5, rtol=1e-5)
    vae.disable_slicing()
    vae.enable_tiling()
    tiled = text_pipe(**call).mels
    with torch.no_grad():
        by_hand = vae.tiled_decode(vae.encode(mel.encode(sounds[:3])).latent_dist.mode()).sample
    vae.disable_tiling()
    torch.testing.assert_close(tiled, by_hand, atol=1e-4, rtol=1e-4)
    assert rms(tiled - expected) > 1e-3


def test_half_precision(text_pipe, vae, text_unet, words):
    seen = []

    def look(pipe, step, timestep, shown):
        seen.append(shown["latents"].dtype)
        return {}

    call = dict(output_type="latent", generator=seeds(0), **STEPS)
    exactly = text_pipe("slow piano", **call).latents
    networks = [copy.deepcopy(network).to(torch.bfloat16) for network in (text_unet, vae)]
    pipe = LatentAudioDiffusionPipeline(networks[0], text_pipe.scheduler, text_pipe.mel, networks[1], *words)
    call["generator"] = seeds(0)
    roughly = quiet(pipe)("slow piano", **call, callback_on_step_end=look).latents
    assert set(seen) == {torch.float32} and 1e-6 < rms(roughly - exactly) < 0.1 * rms(exactly)
    assert np.isfinite(pipe("slow piano", num_inference_steps=2).audios).all()


# Sounds longer than a window


def test_windows():
    x = normal(2, 3, 5, 70)
    for length in (8, 9, 20, 37, 70):
        for ring in (False, True):
            starts = window_starts(length, 8, ring=ring)
            edges = torch.cat([starts, starts[:1] + length]) if ring else starts
            assert (edges.diff() <= 4).all() and starts[0] == 0 and (ring or starts[-1] == length - 8)
            same = in_windows(lambda window, row: window, x[..., :length], 8, ring=ring, batch_size=3)
            torch.testing.assert_close(same, x[..., :length])
    # What is made may be longer or shorter than a window, and may know the row that it belongs to.
    pooled = in_windows(lambda window, row: torch.nn.functional.avg_pool2d(window, (1, 2)), x, 8, unit=2)
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool2d(x, (1, 2)))
    doubled = in_windows(lambda window, row: window.repeat_interleave(2, -1) + row[:, None, None, None], x, 8)
    torch.testing.assert_close(doubled, x.repeat_interleave(2, -1) + torch.tensor([0, 1])[:, None, None, None])
    # Windows that disagree are mixed with weights that fall to their edges: no jump.
    count = iter(range(100))
    levels = in_windows(lambda window, row: window * 0 + next(count), x[:1], 8, batch_size=1)[0, 0, 0]
    assert levels.diff().min() >= 0 and levels.diff().max() < 0.5


def test_places():
    assert mirrored(9, 3).tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert mirrored(2, 3).tolist() == [0, 1]
    new = torch.zeros(1, 40, dtype=torch.bool)
    assert continuations(new, 8) == []
    new[:, 20:] = True
    assert continuations(new, 8) == [16, 20, 24, 28, 32]
    new[:] = True
    assert continuations(new, 8) == [0, 4, 8, 12, 16, 20, 24, 28, 32]


def test_long_sounds_are_what_the_windows_say(exact_pipe, clean):
    """Where the network looks at each number by itself, windows make no difference to the whole."""
    pipe = exact_pipe(mean=torch.full((1, 4, 1, 1), 0.2), spread=0.6)
    noise, scheduler = normal(2, 4, 8, 50), DDIMScheduler(clip_sample=False)
    made = pipe(latents=noise, num_inference_steps=6, output_type="latent").latents
    for size in (1, 5):
        again = pipe(latents=noise, num_inference_steps=6, output_type="latent", window_batch_size=size).latents
        torch.testing.assert_close(again, made)
    scheduler.set_timesteps(6)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(made, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("seconds", [0.1, 0.5, 0.7501])
def test_lengths(text_pipe, mel, seconds, continuous):
    call = dict(audio_length_in_s=seconds, continuous=continuous, num_inference_steps=1)
    result = text_pipe(**call, output_type="pt")
    samples = round(seconds * 8000)
    assert result.audios.shape == (1, samples) and result.mels.shape == (1, 1, 16, samples // 64 + 1)


def test_continuous_windows_continue(mel_pipe):
    """Each keeps the half that is there, and makes the other."""
    windows = []

    def look(pipe, step, timestep, shown):
        windows.extend([shown["latents"]] if step % 20 == 19 else [])
        return {}

    pipe = mel_pipe(DPMSolverMultistepScheduler(), spread=0.3)
    call = dict(audio_length_in_s=1.0, continuous=True, num_inference_steps=20, output_type="mel")
    mels = pipe(num_waveforms_per_prompt=3, generator=seeds(0, 1, 2), callback_on_step_end=look, **call).mels
    done = 0
    for start, made in zip([0, 16, 32, 48, 64, 80, 94], windows, strict=True):
        width = min(start + 32, 126) - done
        assert torch.equal(mels[..., done : done + width], made[..., done - start : done - start + width])
        done += width
    assert mels.shape == (3, 1, 16, 126)
    assert (mels[:, :, :, 1:] - mels[:, :, :, :-1]).abs().amax((1, 2)).min() > 0.1  # no frame is repeated
    frames = mels[0, 0].T
    assert (torch.cdist(frames, frames) + 9 * torch.eye(126)).min() > 0.1
    together = pipe(num_waveforms_per_prompt=3, generator=seeds(0, 1, 2), **(call | {"continuous": False})).mels
    assert abs(mels.std() - together.std()) < 0.01
    torch.testing.assert_close(pipe(generator=seeds(1), **call).mels, mels[1:2])


@pytest.mark.parametrize("continuous", [False, True])
def test_outpainting_keeps_the_sound_and_its_level(mel, continuous):
    """Behind noise of a level, a network that knows the level, and an autoencoder that loses 4 dB of it."""
    audio = 0.05 * normal(2, 4000)
    mels = mel.encode(audio)
    level = mels.mean((0, 3))[None, :, :, None]

    class Quieter(AutoencoderKL):
        def encode(self, x):
            moments = torch.nn.functional.avg_pool2d(x, 2).expand(-1, 4, -1, -1)
            return type("Output", (), {"latent_dist": DiagonalGaussianDistribution(torch.cat([moments, moments], 1))})

        def decode(self, z):
            x = z[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)
            return DecoderOutput(x - 4 / 40)  # [-1, 1] is 80 dB

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    quieter = Quieter(1, 1, **blocks, block_out_channels=(32, 32), scaling_factor=1.0).eval()
    known = torch.nn.functional.avg_pool2d(level, (2, 1)).expand(1, 4, 8, 1)
    pipe = quiet(LatentAudioDiffusionPipeline(predictor(known, spread=0.05), UNCLIPPED, mel, quieter))
    made = pipe(
        audio=audio, audio_length_in_s=1.5, continuous=continuous, num_inference_steps=10, generator=seeds(0, 1),
        output_type="pt",
    ).audios  # fmt: skip
    assert made.shape == (2, 12000)
    assert torch.equal(made[:, : 4000 - 128], audio[:, : 4000 - 128])
    # Windows of 100 ms before and after the join, and all along what is new
    levels = 10 * made.unfold(1, 800, 800).square().mean(2).log10()
    assert (levels[:, 5:] - levels[:, :5].mean(1, keepdim=True)).abs().max() < 1.5
    assert (levels[:, 5:].mean(1) - levels[:, :5].mean(1)).abs().max() < 1
    join = 10 * (made[:, 4000:4800].square().mean(1) / made[:, 3200:4000].square().mean(1)).log10()
    assert join.abs().max() < 1


# Given sound


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("length", [2047, 5000])
def test_what_is_kept_comes_back(text_pipe, mel, length, continuous):
    """For a batch, several spans and latents of four channels; nothing that was given is changed."""
    audio = 0.1 * normal(3, length).numpy()
    given, noise = audio.copy(), normal(3, 4, 8, 40 if length == 5000 else 16)
    spans, fade = [(0.03, 0.06), (0.19, 0.25 if length == 5000 else 0.22)], mel.config.n_fft // 2
    results = []
    for i in (0, 3):
        latents = noise.clone() if i == 0 and not continuous else None
        results.append(text_pipe(
            "slow piano", audio=audio, mask=spans, generator=seeds(i, i + 1, i + 2), output_type="pt", latents=latents,
            continuous=continuous, **STEPS,
        ))  # fmt: skip
        assert latents is None or torch.equal(latents, noise)
    np.testing.assert_array_equal(audio, given)
    new = torch.zeros(length, dtype=torch.bool)
    for start, end in spans:
        new[round(start * 8000) : round(end * 8000)] = True
    position = torch.arange(length)
    far = torch.stack([(position < s * 8000 - fade - 1) | (position > e * 8000 + fade) for s, e in spans]).all(0)
    frames = torch.stack([new[max(0, 64 * i - 32) : 64 * i + 32].any() for i in range(results[0].mels.shape[-1])])
    known = mel.encode(torch.from_numpy(given[:, :2047])) if length == 2047 else None
    for result in results:
        assert torch.equal(result.audios[:, far], torch.from_numpy(given)[:, far])
        assert (result.audios - torch.from_numpy(given)).abs()[:, new].max() > 0.01
        if known is not None:
            assert torch.equal(result.mels[..., ~frames], known[..., ~frames])
    torch.testing.assert_close(results[0].mels[..., ~frames], results[1].mels[..., ~frames], rtol=0, atol=0)
    assert rms((results[0].mels - results[1].mels)[..., frames]) > 1e-2


def test_latents_beside_what_is_new_are_new(text_pipe, sounds):
    """Those of which the autoencoder has seen what was there before."""
    audio = torch.nn.functional.pad(sounds[:1], (0, 1))
    for loop, frames, expected in ((False, range(12, 16), [5, 6, 7, 8]), (True, range(2), [0, 1, 15])):
        call = dict(audio=audio if loop else sounds[:1], loop=loop, output_type="latent")
        mask = torch.tensor([i in frames for i in range(32)])
        known = text_pipe(strength=0, **call).latents
        made = text_pipe(mask=mask, generator=seeds(0), **call, **STEPS).latents
        assert (made != known).any(1).any(1)[0].nonzero().flatten().tolist() == expected


def test_windows_that_reach_beyond_the_end_are_not_kept(mel_pipe, mel, sounds):
    """Those of the front end: half of 256 samples from the last of 1500, at 1372, frame 21 is the nearest."""
    call = dict(audio=sounds[0, :1500], audio_length_in_s=2047 / 8000, output_type="mel", **STEPS)
    mels = torch.cat([mel_pipe()(generator=seeds(seed), **call).mels for seed in (0, 1)])
    known = mel.encode(sounds[:1, :1500])[..., :21]
    torch.testing.assert_close(mels[..., :21], known.expand(2, -1, -1, -1))
    assert (mels[0] != mels[1]).all(0).all(0)[21:].all()


def test_what_a_vocoder_makes_is_as_loud_as_what_is_kept():
    class Hiss(MMAudioVocoder):
        def forward(self, mels, return_dict=True):
            return (0.003 * normal(len(mels), 1, 64 * mels.shape[-1], seed=4),)

    mel = MelSpectrogram(8000, 256, 64, 16, 32, method="bigvgan")
    audio = 0.1 * normal(1, 4096)
    pipe = LatentAudioDiffusionPipeline(
        predictor(torch.zeros(1, 1, 1, 1)), UNCLIPPED, mel, vocoder=Hiss(16, 4, (8, 8), (16, 16))
    )
    made = quiet(pipe)(audio=audio, mask=[(0.2, 0.3)], output_type="pt", **STEPS).audios
    assert abs(20 * math.log10(rms(made[:, 1600:2400]) / 0.1)) < 1


def test_variations_are_as_loud_as_the_sound(sounds):
    """Also where 0 dB is the loudest bin of each sound, so that its mel does not say how loud it is."""
    mel = MelSpectrogram(8000, 256, 64, 16, 32, ref="slice")
    quietly = sounds[1:2] / 20
    pipe = quiet(LatentAudioDiffusionPipeline(predictor(mel.encode(quietly)), UNCLIPPED, mel))
    made = pipe(audio=quietly, strength=0.5, generator=seeds(0), output_type="pt", **STEPS).audios
    assert 0.7 < rms(made) / rms(quietly) < 1.4


def test_the_network_sees_what_is_kept(text_pipe, sounds):
    """At each step with the noise of that step, so that what is new can fit to it."""
    seen, made, noise = [], [], normal(1, 4, 8, 16)
    hook = text_pipe.unet.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[:2]))
    for audio in sounds[:2]:
        known = text_pipe(audio=audio, strength=0, output_type="latent").latents
        seen.clear()
        made.append(text_pipe(audio=audio, mask=[(0.0, 0.1)], latents=noise, output_type="latent", **STEPS).latents)
        for x, t in seen:
            expected = text_pipe.scheduler.add_noise(known, noise, t[None])
            torch.testing.assert_close(x[..., 9:], expected[..., 9:])
        assert len(seen) == 4
    hook.remove()
    assert rms((made[0] - made[1])[..., :5]) > 1e-3


def test_masks_per_sound(mel_pipe, data):
    masks = torch.zeros(2, 32, dtype=torch.bool)
    masks[0, :8] = masks[1, 24:] = True
    mels = mel_pipe()(audio=data[:2], mask=masks, generator=seeds(0, 1), output_type="mel", **STEPS).mels
    assert torch.equal((mels == data[:2]).all(2)[:, 0], ~masks)


def test_strength(mel_pipe, text_pipe, sounds, data):
    pipe = mel_pipe(spread=1.0)
    same = pipe(audio=sounds[:2], strength=0, output_type="pt")
    assert torch.equal(same.audios, sounds[:2]) and torch.equal(same.mels, data[:2])
    assert torch.equal(pipe(audio=data[:2], strength=0, output_type="pt").mels, data[:2])
    short = pipe(audio=sounds[0, :1500], strength=0, output_type="pt").audios
    assert torch.equal(short, sounds[:1, :1500])
    # What fills the window up is no silence, which would be heard as the end of the sound.
    filled = pipe(audio=sounds[0, :1500], strength=0, output_type="latent").latents
    assert filled.shape == data[:1].shape and (filled.amax(2) > -0.5).all()
    free = [
        text_pipe(audio=audio, strength=1, generator=seeds(5), output_type="latent", **STEPS).latents
        for audio in sounds[:2]
    ]
    torch.testing.assert_close(*free)
    torch.testing.assert_close(free[0], text_pipe(generator=seeds(5), output_type="latent", **STEPS).latents)
    likeness = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        call = dict(strength=strength, generator=seeds(7), output_type="mel", num_inference_steps=20)
        made = pipe(audio=data[:1], **call).mels
        likeness.append(torch.corrcoef(torch.stack([made.flatten(), data[0].flatten()]))[0, 1].item())
    assert likeness == sorted(likeness, reverse=True) and likeness[0] > 0.95 and abs(likeness[-1]) < 0.15


@pytest.mark.parametrize("continuous", [False, True])
def test_one_style_for_a_whole_track(mel_pipe, continuous):
    """Of a track that repeats itself with every window, each repetition becomes the same."""
    pipe, window = mel_pipe(spread=1.0), 0.3 * normal(1, 1, 16, 32)
    track = window.repeat(1, 1, 1, 4)
    made = pipe(
        audio=track, strength=0.6, continuous=continuous, generator=seeds(0), output_type="mel", num_inference_steps=10
    ).mels
    assert made.shape == track.shape and rms(made - track) > 0.3
    if continuous:  # windows begin half a window apart, with the same noise each
        torch.testing.assert_close(made[..., 48:64] - made[..., 80:96], torch.zeros(1, 1, 16, 16), atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(made[..., :96], made[..., 32:], atol=1e-4, rtol=1e-4)
    other = pipe(audio=track, strength=0.6, generator=seeds(1), output_type="mel", num_inference_steps=10).mels
    assert rms(other - made) > 0.1


# Loops


@pytest.mark.parametrize("windows", [0.5, 1, 2])
def test_loops_commute_with_rotation(text_pipe, windows):
    """On a ring no place is special: turned noise makes the same sound, turned."""
    width = int(16 * windows)
    latents = normal(2, 4, 8, width)
    turn = 8 if windows == 2 else 6  # half a window of a long ring; what the network halves of a short one
    for loop in (True, False) if windows == 1 else (True,):
        call = dict(loop=loop, output_type="mel", **STEPS)
        mels = text_pipe("drums", latents=latents, **call).mels
        turned = text_pipe("drums", latents=latents.roll(turn, -1), **call).mels.roll(-2 * turn, -1)
        assert mels.shape[-1] == 2 * width
        difference = rms(mels - turned)
        assert difference < 1e-4 if loop else difference > 1e-3


def test_loops_of_tones_have_no_seam(mel):
    """Steady tones, played over and over: the power above all partials is nowhere greater than at the seam."""
    time = torch.arange(mel.slice_samples) / 8000
    tones = 0.3 * torch.sin(2 * math.pi * torch.tensor([[437.0]]) * time)
    steady = mel.encode(tones)[..., 16:17].expand(-1, -1, -1, 32).contiguous()
    pipe = quiet(LatentAudioDiffusionPipeline(predictor(steady), UNCLIPPED, mel))
    for loop in (True, False):
        made = pipe(
            num_waveforms_per_prompt=8, loop=loop, generator=seeds(*range(8)), output_type="pt", **STEPS
        ).audios
        assert made.shape == (8, 2048 if loop else 2047)
        frames = torch.cat([made, made], 1).unfold(1, 64, 1) * torch.hann_window(64)
        treble = torch.fft.rfft(frames)[..., 26:].abs().square().sum(-1)
        seam = made.shape[1] - 32
        around, elsewhere = treble[:, seam - 32 : seam + 32].amax(1), treble[:, 64 : seam - 64].amax(1)
        assert (around < 1.5 * elsewhere).all() if loop else (around > 10 * elsewhere).all()


def test_a_loop_is_seen_with_itself_around(mel_pipe, mel):
    loop = 0.1 * normal(1, 2048)
    seen = mel_pipe()(audio=loop, loop=True, strength=0, output_type="mel").mels
    torch.testing.assert_close(seen, mel.encode(loop.repeat(1, 3))[..., 32:64], atol=1e-4, rtol=1e-4)


def test_a_loop_is_edited_as_a_loop(text_pipe):
    loop = text_pipe(loop=True, audio_length_in_s=0.5, generator=seeds(0), **STEPS).audios
    assert loop.shape == (1, 4096)
    again = text_pipe(audio=loop, mask=[(0.47, 0.512)], loop=True, generator=seeds(1), **STEPS).audios
    assert not np.array_equal(again[:, :64], loop[:, :64])  # new sound at the end fades into the beginning
    np.testing.assert_array_equal(again[:, 129 : 3760 - 129], loop[:, 129 : 3760 - 129])


# The same path upwards


def test_inversion_is_undone_by_sampling(text_pipe, sounds):
    """On latents, with a prompt and guidance; the more steps, the nearer."""
    text_pipe.scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    errors = []
    for steps in (3, 10, 50):
        call = dict(num_inference_steps=steps, guidance_scale=1.5)
        noise = text_pipe.invert(sounds[:2], "slow piano", **call)
        back = text_pipe("slow piano", latents=noise, output_type="latent", **call).latents
        expected = text_pipe(audio=sounds[:2], strength=0, output_type="latent").latents
        errors.append(rms(back - expected) / rms(expected))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2
    other = text_pipe("slow piano", latents=noise.flip(0), output_type="latent", **call).latents
    assert rms(other.flip(0) - expected) < 0.2 * rms(expected) < 0.5 * rms(other - expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_inversion_of_a_gaussian(mel_pipe, data, name):
    """DDIM from x with sigma -> 0 to x_T = x sqrt(a s^2 + 1 - a) / s, whatever the scheduler that goes down again."""
    pipe = mel_pipe(getattr(diffusers, name).from_config(UNCLIPPED.config), spread=0.5)
    noise = pipe.invert(data[:2], num_inference_steps=250)
    torch.testing.assert_close(noise, data[:2] / 0.5, atol=0.02, rtol=0.02)
    back = pipe(latents=noise, num_inference_steps=250, output_type="mel").mels
    torch.testing.assert_close(back, data[:2], atol=0.02, rtol=0.02)


def test_inversion_keeps_the_betas_of_the_scheduler(mel_pipe, data):
    """Also those that are the default of the one scheduler, but not of the other."""
    explicit = DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, timestep_spacing="trailing")
    noise = [
        mel_pipe(scheduler).invert(data[:1], num_inference_steps=5)
        for scheduler in (HeunDiscreteScheduler(), explicit)
    ]
    torch.testing.assert_close(*noise)


def test_inversion_of_a_poisson_flow(mel_pipe, data):
    scheduler = PoissonFlowScheduler(aug_dim=None, prediction_type="sample")
    pipe = mel_pipe(scheduler, kind="poisson", spread=0.5)
    noise = pipe.invert(data[:2])
    expected = data[:2] * math.sqrt((0.25 + 80**2) / (0.25 + 0.002**2)) / 80
    torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-4)
    back = pipe(latents=noise, num_inference_steps=200, output_type="mel").mels
    torch.testing.assert_close(back, data[:2], rtol=3e-3, atol=1e-3)


def test_interpolation(mel_pipe, data, sounds):
    pipe, call = mel_pipe(spread=0.5), dict(num_inference_steps=100, output_type="mel")
    mels = pipe.interpolate(data[:1], data[1:2], 3, **call).mels
    torch.testing.assert_close(mels[[0, 2]], data[:2], atol=0.05, rtol=0.05)
    assert rms(mels[1] - data[0]) > 0.1 < rms(mels[1] - data[1])
    same = pipe.interpolate(sounds[0], sounds[0], 3, **call).mels
    torch.testing.assert_close(same, data[:1].expand(3, -1, -1, -1), atol=0.05, rtol=0.05)
    a, b = normal(2, 1, 2, 3, 4)
    ends = pipe.slerp(a, b, [0.0, 0.5, 1.0])
    torch.testing.assert_close(ends[[0, 2]], torch.cat([a, b]))
    torch.testing.assert_close(ends[1].norm(), (a.norm() * b.norm()).sqrt())
    torch.testing.assert_close(pipe.slerp(a, a, 0.3), a)


# What goes out


def test_output_types(text_pipe, mel):
    kinds = {
        kind: text_pipe(output_type=kind, generator=seeds(0), **STEPS) for kind in ("np", "pt", "mel", "pil", "latent")
    }
    np.testing.assert_array_equal(kinds["np"].audios, kinds["pt"].audios.numpy())
    np.testing.assert_array_equal(kinds["np"].mels, kinds["mel"].mels.numpy())
    assert kinds["mel"].audios is None and kinds["latent"].latents.shape == (1, 4, 8, 16)
    assert kinds["pil"].images[0].tobytes() == mel.to_image(kinds["mel"].mels)[0].tobytes()
    audios, mels, rate = text_pipe(return_dict=False, generator=seeds(0), **STEPS)
    np.testing.assert_array_equal(audios, kinds["np"].audios)
    assert rate == 8000 and mels.shape == (1, 1, 16, 32)


def test_callbacks_see_and_change_the_latents(exact_pipe, clean):
    seen = []

    def look(pipe, step, timestep, shown):
        seen.append((step, timestep.item()))
        return {"latents": shown["latents"] + 1} if step == 9 else {}

    pipe = exact_pipe()
    made = pipe(num_inference_steps=10, output_type="latent", callback_on_step_end=look).latents
    assert rms(made - clean - 1) < 1e-6
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))
    seen.clear()
    pipe(audio_length_in_s=0.5, continuous=True, callback_on_step_end=look, num_inference_steps=3)
    assert [step for step, _ in seen] == list(range(pipe.num_timesteps)) and len(seen) == 3 * 3


def test_eta_and_generators_reach_the_scheduler(exact_pipe):
    pipe = exact_pipe(spread=0.5)
    call = dict(output_type="latent", latents=normal(1, 4, 8, 16), **STEPS)
    still = [pipe(generator=seeds(seed), **call).latents for seed in (0, 1)]
    noisy = [pipe(generator=seeds(seed), eta=1.0, **call).latents for seed in (0, 1, 0)]
    assert torch.equal(*still) and rms(noisy[0] - noisy[1]) > 0.01 and torch.equal(noisy[0], noisy[2])


def test_vocoder_reads_log_magnitudes():
    torch.manual_seed(0)
    mel = MelSpectrogram(8000, 256, 64, 16, 32, method="bigvgan", mean=0.1, std=0.4)
    vocoder = MMAudioVocoder(16, 16, (8, 8), (16, 16)).eval()
    audio = 0.3 * normal(1, mel.slice_samples)
    data = mel.encode(audio)
    pipe = quiet(LatentAudioDiffusionPipeline(predictor(data), UNCLIPPED, mel, vocoder=vocoder))
    result = pipe(generator=seeds(0), output_type="pt", **STEPS)
    logarithms = mel._bands(audio).transpose(1, 2).clamp(1e-5).log()
    torch.testing.assert_close(result.audios, vocoder(logarithms).sample[:, 0].detach(), atol=1e-3, rtol=1e-2)


def test_offloading_changes_nothing(text_pipe):
    call = dict(generator=seeds(0), **STEPS)
    expected = text_pipe("drums", **call).audios
    text_pipe.enable_model_cpu_offload(device="cpu")
    order = [name for name in text_pipe.model_cpu_offload_seq.split("->") if getattr(text_pipe, name) is not None]
    assert order == ["text_encoder", "unet", "vae"] and all(getattr(text_pipe, name)._hf_hook for name in order)
    call["generator"] = seeds(0)
    np.testing.assert_allclose(text_pipe("drums", **call).audios, expected, atol=1e-6)
    text_pipe.remove_all_hooks()


# Bad input


@pytest.mark.parametrize(("call", "message"), [
    (dict(prompt=""), "A prompt is empty: leave prompt out"),
    (dict(prompt=["drums", " "]), "A prompt is empty"),
    (dict(prompt=[]), "prompt is an empty list"),
    (dict(prompt="drums", prompt_embeds=torch.zeros(1, 2, 16)), "prompt and prompt_embeds are both given"),
    (dict(prompt=["drums"] * 2, audio=torch.zeros(3, 2047), strength=0.5), "prompt has 2 entries for 3 prompts"),
    (dict(guidance_scale=3.0), "guidance_scale is 3.0, but there is no prompt"),
    (dict(prompt=["drums", 3]), "prompt holds 3: give a text"),
    (dict(negative_prompt="drums"), "There is a negative prompt, but no prompt"),
    (dict(prompt_embeds=torch.zeros(1, 3, 15)), r"prompt_embeds have shape \(1, 3, 15\): they must be .*16"),
    (dict(prompt="drums", negative_prompt="bass", guidance_scale=1), "guidance_scale is 1, which does not look"),
    (dict(prompt="drums", guidance_rescale=1.5), "guidance_rescale is 1.5"),
    (dict(guidance_rescale=0.5), "guidance_rescale is 0.5: it lies between 0 and 1, and needs"),
    (dict(audio=torch.zeros(2047)), "not what to do with it: add strength"),
    (dict(audio=torch.zeros(1, 2, 3), strength=0.5), r"audio has shape \(1, 2, 3\)"),
    (dict(audio=torch.zeros(0), strength=0.5), r"audio has shape \(0,\)"),
    (dict(audio=torch.zeros(4000), audio_length_in_s=0.3), "audio_length_in_s is 0.3, but the audio .* has 0.5 s"),
    (dict(audio=torch.zeros(4000), audio_length_in_s=0.5), "audio is as long as audio_length_in_s"),
    (dict(audio=torch.zeros(2000), loop=True, strength=0.5), "audio has 2000 samples: a loop has a multiple of 256"),
    (dict(audio=torch.zeros(2047), strength=1.5), "strength is 1.5: it must lie between 0"),
    (dict(strength=0.5), "strength needs the audio"),
    (dict(mask=[(0, 1)]), "mask needs the audio"),
    (dict(audio=torch.zeros(2047), mask=[]), "mask is empty: give spans of seconds"),
    (dict(audio=torch.zeros(2047), mask=[(0.2, 0.3)]), r"mask holds \(0.2, 0.3\) s: use 0 <= start < end <= 0.25"),
    (dict(audio=torch.zeros(2047), mask=[True] * 30), r"mask has shape \(30,\): give one boolean for each of 32"),
    (dict(audio=torch.zeros(2, 4000), mask=torch.ones(2, 63, dtype=torch.bool), continuous=True), "mask has 2 rows"),
    (dict(continuous=True, loop=True), "continuous goes from begin to end: leave out loop"),
    (dict(latents=torch.zeros(1, 4, 8, 15), audio_length_in_s=0.2), r"latents have shape \(1, 4, 8, 15\)"),
    (dict(latents=torch.zeros(2, 4, 8, 16), num_waveforms_per_prompt=3), "latents has 2 entries for a batch of 3"),
    (dict(generator=seeds(0, 1)), "generator has 2 entries for a batch of 1"),
    (dict(audio_length_in_s=-1), "audio_length_in_s is -1"),
    (dict(num_inference_steps=0), "num_inference_steps is 0"),
    (dict(num_waveforms_per_prompt=0), "num_waveforms_per_prompt is 0"),
    (dict(eta=60), "eta is 60: it must lie between 0"),
    (dict(output_type="wav"), "output_type is 'wav'"),
    (dict(callback_on_step_end_tensor_inputs=["mel"]), "callback_on_step_end_tensor_inputs holds 'mel'"),
])  # fmt: skip
def test_bad_input(text_pipe, call, message):
    with pytest.raises(ValueError, match=message) as error:
        text_pipe(**call)
    assert "\n" not in str(error.value)


def test_bad_input_of_other_pipelines(text_pipe, exact_pipe, mel_pipe, mel, vae, text_unet, words, sounds, clean):
    with pytest.raises(ValueError, match="the network reads no text"):
        exact_pipe()("drums")
    mute = LatentAudioDiffusionPipeline(text_unet, UNCLIPPED, mel, vae)
    with pytest.raises(ValueError, match="There is no text encoder: give prompt_embeds"):
        mute("drums")
    assert quiet(mute)(prompt_embeds=torch.ones(1, 3, 16), output_type="mel", **STEPS).mels.isfinite().all()
    with pytest.raises(ValueError, match="PNDMScheduler cannot begin within its steps"):
        exact_pipe(PNDMScheduler())(audio=sounds[0], strength=0.5)
    with pytest.raises(ValueError, match="IPNDMScheduler cannot add noise"):
        exact_pipe(IPNDMScheduler())(audio=sounds[0], strength=0.5)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no eta"):
        exact_pipe(EulerDiscreteScheduler())(eta=0.5)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler cannot run backwards"):
        exact_pipe(FlowMatchEulerDiscreteScheduler(), "flow").invert(sounds[0])
    with pytest.raises(ValueError, match="use n >= 2"):
        mel_pipe().interpolate(sounds[0], sounds[1], 1)
    with pytest.raises(ValueError, match="A vocoder needs a mel of method 'bigvgan'"):
        LatentAudioDiffusionPipeline(text_unet, UNCLIPPED, mel, vae, vocoder=vae)


def test_parts_that_do_not_fit(mel, vae, text_unet, words):
    def make(unet=text_unet, vae=vae, mel=mel, encoder=words[1]):
        return LatentAudioDiffusionPipeline(unet, UNCLIPPED, mel, vae, words[0], encoder)

    odd = MelSpectrogram(8000, 256, 64, 16, 30)
    with pytest.raises(ValueError, match=r"num_frames is 30, but .* 2 times and the VAE 2 times: use a multiple of 4"):
        make(mel=odd)
    with pytest.raises(ValueError, match="The U-Net takes 4 channels, but the mel has 1"):
        make(vae=None)
    other = AutoencoderKL.from_config({**vae.config, "latent_channels": 3})
    with pytest.raises(ValueError, match="The U-Net takes 4 channels, but the VAE makes 3"):
        make(vae=other)
    with pytest.raises(ValueError, match=r"made for samples of \(8, 16\), but the mel gives \(8, 32\)"):
        make(mel=MelSpectrogram(8000, 256, 64, 16, 64))
    from small_t5 import small_text_encoder

    with pytest.raises(ValueError, match="reads text of width 16, but the text encoder makes 24"):
        make(encoder=small_text_encoder(words[0], width=24))
