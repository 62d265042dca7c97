"""With a network that knows its data exactly, what the pipeline should return is known as well."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    MMAudioVocoder,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from exact_networks import GaussianDenoiser, GaussianNoise, exact, exact_noise, noise_of, quiet, seeds
from scipy import stats

from tonefield import MelPFGMPipeline, MelSpectrogram, PoissonFlowScheduler, ScoreSDEScheduler


def nearest(mels, data):
    """For each mel, the number of the nearest in `data`, and the largest difference from it."""
    difference = (torch.as_tensor(mels)[:, None] - data).abs().flatten(2).amax(2)
    return difference.argmin(1), difference.amin(1)


# Generation


@pytest.mark.parametrize("aug_dim", [1, 128, None])
@pytest.mark.parametrize("solver", ["dpmsolver++", "heun"])
def test_samples_are_the_data(make_pipe, data, aug_dim, solver):
    result = make_pipe(aug_dim, solver_type=solver)(48, generator=seeds(*range(48)))
    which, distance = nearest(result.mels, data)
    # At D = 1 a start far out in the heavy tail may end between two sounds.
    assert distance.sort().values[: 44 if aug_dim == 1 else None].max() < 1e-4
    assert len(which.unique()) == len(data)


def test_sounds_have_the_mels_that_were_generated(make_pipe, mel):
    result = make_pipe()(4, generator=seeds(0, 1, 2, 3))
    assert result.audios.shape == (4, mel.slice_samples) and result.sampling_rate == 8000
    heard, wanted = mel.encode(torch.as_tensor(result.audios)), torch.as_tensor(result.mels)
    loud = wanted > 0  # within 40 dB of full scale
    assert (heard - wanted)[loud].abs().mean() < 0.06 < (heard - wanted.roll(1, 0))[loud].abs().mean() / 3


@pytest.mark.parametrize("scheduler", [
    EDMEulerScheduler(), EDMDPMSolverMultistepScheduler(), PoissonFlowScheduler(aug_dim=None, solver_type="euler"),
])  # fmt: skip
def test_schedulers_of_edm(scheduler, mel, data):
    pipe = quiet(MelPFGMPipeline(exact(data, None, kind="edm"), scheduler, mel))
    which, distance = nearest(
        pipe(24, num_inference_steps=40, generator=seeds(*range(24)), output_type="mel").mels, data
    )
    assert distance.max() < 1e-3
    assert len(which.unique()) > 3
    mask = [False] * 20 + [True] * 12
    mels = pipe(audio=data[2:3], mask=mask, num_inference_steps=40, generator=seeds(0), output_type="mel").mels
    assert nearest(mels, data)[0].item() == 2 and nearest(mels, data)[1] < 1e-3


@pytest.mark.parametrize("solver", ["pc", "heun"])
def test_score_sde(solver, mel, data):
    scheduler = ScoreSDEScheduler("ve", solver_type=solver, sampling_eps=1e-5)
    pipe = quiet(MelPFGMPipeline(exact(data, None, kind="epsilon"), scheduler, mel))
    mels = pipe(12, num_inference_steps=200, generator=seeds(*range(12)), output_type="mel").mels
    which, distance = nearest(mels, data)
    assert distance.max() < 0.05  # noise of sigma_min = 0.01 remains
    assert len(which.unique()) > 2
    again = pipe(num_inference_steps=200, generator=seeds(7), output_type="mel").mels
    torch.testing.assert_close(again, mels[7:8])
    mels = pipe(audio=data[1:2], strength=0.3, num_inference_steps=50, generator=seeds(0), output_type="mel").mels
    assert nearest(mels, data)[0].item() == 1


def test_second_call_equals_the_first(random_pipe):
    first, second = (random_pipe(2, generator=seeds(3, 4)) for _ in range(2))
    np.testing.assert_array_equal(first.audios, second.audios)
    assert not np.array_equal(first.audios[0], first.audios[1])


@pytest.mark.parametrize("options", [{}, {"loop": True}, {"mask": [(0.05, 0.15)]}, {"strength": 0.4}])
def test_a_batch_equals_its_sounds_one_by_one(random_pipe, sounds, options):
    audio = sounds[:3] if options and "loop" not in options else None
    labels = [0, 2, 1]
    together = random_pipe(3, class_labels=labels, guidance_scale=2, audio=audio, generator=seeds(5, 6, 7), **options)
    for i in range(3):
        alone = random_pipe(
            class_labels=labels[i], guidance_scale=2, audio=None if audio is None else audio[i],
            generator=seeds(5 + i), **options,
        )  # fmt: skip
        torch.testing.assert_close(alone.mels[0], together.mels[i], rtol=0, atol=2e-5)
        # Griffin-Lim makes more of last digits; two sounds differ by more than 1.
        np.testing.assert_allclose(alone.audios[0], together.audios[i], atol=5e-3)


def test_mask_per_sound(random_pipe, data):
    masks = torch.zeros(2, 32, dtype=torch.bool)
    masks[0, :8] = masks[1, 24:] = True
    mels = random_pipe(audio=data[:2], mask=masks, generator=seeds(0, 1), output_type="mel").mels
    assert torch.equal((mels == data[:2]).all(2)[:, 0], ~masks)


def test_half_precision_network(random_pipe):
    latents = []

    def look(pipe, step, timestep, shown):
        latents.append(shown["latents"])
        return {}

    exactly = random_pipe(2, generator=seeds(0, 1), output_type="mel").mels
    random_pipe.to(dtype=torch.bfloat16)
    roughly = random_pipe(2, generator=seeds(0, 1), output_type="mel", callback_on_step_end=look).mels
    assert random_pipe.unet.dtype == torch.bfloat16 and random_pipe.mel.filterbank.dtype == torch.float32
    assert {latent.dtype for latent in latents} == {torch.float32}
    # bfloat16 keeps 8 bits of what the network says; 18 steps of arithmetic in it would leave less.
    assert 1e-6 < (exactly - roughly).abs().mean() / exactly.abs().mean() < 0.02
    assert np.isfinite(random_pipe(output_type="np").audios).all()


@pytest.mark.parametrize("scheduler", [PoissonFlowScheduler(), ScoreSDEScheduler("ve", solver_type="heun")])
def test_latents_are_noise_at_unit_scale(random_pipe, scheduler):
    """As in diffusers: what the scheduler makes of noise at the start is made of given noise too."""
    pipe = quiet(MelPFGMPipeline(random_pipe.unet, scheduler, random_pipe.mel))
    call = dict(num_inference_steps=2, output_type="mel")
    given = pipe(latents=pipe.prepare_noise(2, seeds(0, 1)), **call).mels
    assert torch.equal(given, pipe(2, generator=seeds(0, 1), **call).mels)


def test_temperature_scales_the_noise():
    """The flow of a Gaussian is linear in its noise."""
    pipe = quiet(MelPFGMPipeline(GaussianDenoiser(0.5), PoissonFlowScheduler(aug_dim=None, prediction_type="sample")))
    plain, hot = (pipe(3, temperature=t, generator=seeds(0, 1, 2), output_type="mel").images for t in (1, 1.7))
    torch.testing.assert_close(hot, 1.7 * plain)
    latents = torch.randn(3, 1, 4, 4)
    plain, cold = (pipe(3, temperature=t, latents=latents, output_type="mel").images for t in (1, 0.3))
    torch.testing.assert_close(cold, 0.3 * plain)
    # The numbers that come out have the law that the network knows.
    numbers = pipe(4000, num_inference_steps=40, generator=torch.Generator().manual_seed(0), output_type="mel").images
    assert abs(numbers.std() - 0.5) < 0.01


@pytest.mark.parametrize("aug_dim", [1, 4, None])
def test_noise_has_the_law_of_the_scheduler(aug_dim):
    """What a linear flow makes of noise is noise: R^2 / (N spread^2) ~ F(N, D)."""
    pipe = quiet(
        MelPFGMPipeline(GaussianDenoiser(0.5), PoissonFlowScheduler(aug_dim=aug_dim, prediction_type="sample"))
    )
    generator = torch.Generator().manual_seed(1)
    made = pipe(2000, num_inference_steps=100, generator=generator, output_type="mel").images
    ratio = made.flatten(1).square().mean(1).numpy() / 0.25
    law = stats.f(16, aug_dim) if aug_dim else stats.chi2(16, scale=1 / 16)
    assert stats.kstest(ratio, law.cdf).pvalue > 0.01


def test_callbacks_see_and_change_the_latents(make_pipe, data):
    seen = []

    def look(pipe, step, timestep, shown):
        seen.append((step, timestep.item(), shown["latents"].clone()))
        return {"latents": data[3:4] + 0.01 * torch.randn(1, 1, 16, 32)} if step == 15 else {}

    pipe = make_pipe()
    mels = pipe(generator=seeds(0), output_type="mel", callback_on_step_end=look).mels
    assert [step for step, _, _ in seen] == list(range(18)) == list(range(pipe.num_timesteps))
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert nearest(seen[-1][2], data)[0].item() == 3
    torch.testing.assert_close(mels, seen[-1][2])


def test_tuple(make_pipe):
    named = make_pipe()(generator=seeds(0))
    audios, mels, rate = make_pipe()(generator=seeds(0), return_dict=False)
    np.testing.assert_array_equal(audios, named.audios)
    np.testing.assert_array_equal(mels, named.mels)
    assert rate == named.sampling_rate


def test_output_types(make_pipe, mel):
    kinds = {kind: make_pipe()(2, generator=seeds(0, 1), output_type=kind) for kind in ("np", "pt", "mel", "pil")}
    np.testing.assert_array_equal(kinds["np"].audios, kinds["pt"].audios.numpy())
    np.testing.assert_array_equal(kinds["np"].mels, kinds["mel"].mels.numpy())
    assert kinds["mel"].audios is None and kinds["pil"].audios is None
    for picture, expected in zip(kinds["pil"].images, mel.to_image(kinds["mel"].mels), strict=True):
        assert picture.tobytes() == expected.tobytes() and picture.size == (32, 16)


def test_pictures_without_a_mel():
    colours = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipe = quiet(MelPFGMPipeline(exact(colours), PoissonFlowScheduler(prediction_type="sample")))
    kinds = {kind: pipe(8, generator=seeds(*range(8)), output_type=kind).images for kind in ("np", "pt", "mel", "pil")}
    which, distance = nearest(kinds["mel"], colours)
    assert distance.max() < 1e-4 and len(which.unique()) == 3
    torch.testing.assert_close(kinds["pt"], kinds["mel"] / 2 + 0.5)
    np.testing.assert_allclose(kinds["np"], kinds["pt"].permute(0, 2, 3, 1))
    np.testing.assert_array_equal(np.stack([np.array(p) for p in kinds["pil"]]), (kinds["np"] * 255).round())
    mask = torch.arange(8) > 5
    repaired = pipe(audio=colours[1:2], mask=mask, generator=seeds(0), output_type="mel").images
    torch.testing.assert_close(repaired, colours[1:2], atol=1e-4, rtol=0)


def test_vocoder_reads_log_magnitudes():
    torch.manual_seed(0)
    mel = MelSpectrogram(8000, 256, 64, 16, 32, method="bigvgan", mean=0.1, std=0.4)
    vocoder = MMAudioVocoder(16, 16, (8, 8), (16, 16)).eval()
    audio = 0.3 * torch.randn(2, mel.slice_samples)
    data = mel.encode(audio)
    pipe = quiet(MelPFGMPipeline(exact(data), PoissonFlowScheduler(prediction_type="sample"), mel, vocoder))
    result = pipe(4, generator=seeds(0, 1, 2, 3), output_type="pt")
    which, _ = nearest(result.mels, data)
    logarithms = mel._bands(audio).transpose(1, 2).clamp(1e-5).log()
    expected = vocoder(logarithms).sample[:, 0].detach()
    torch.testing.assert_close(result.audios, expected[which], atol=1e-4, rtol=1e-3)


# Classes


def test_labels_choose_the_sound(make_pipe, data):
    pipe = make_pipe(classes=3)
    labels = [0, 1, 2, 0, 1, 2, 2, 2]
    which, distance = nearest(pipe(8, labels, generator=seeds(*range(8))).mels, data)
    assert (which // 2).tolist() == labels and distance.max() < 1e-4
    without, _ = nearest(pipe(24, generator=seeds(*range(24))).mels, data)
    assert len((without // 2).unique()) == 3


def test_classes_have_names(make_pipe, data):
    pipe = make_pipe(classes=3, label2id={"tom": 2, "snare": 0, "kick": 1})
    assert list(pipe.config.label2id) == ["snare", "kick", "tom"]
    for labels, expected in (
        ("tom", [2]), (["kick", 2, "snare"], [1, 2, 0]), (("snare", "kick"), [0, 1]), (np.int64(1), [1]),
        (np.array([0, 2]), [0, 2]), (torch.tensor([2, 1]), [2, 1]),
    ):  # fmt: skip
        which, _ = nearest(pipe(class_labels=labels, generator=seeds(*range(len(expected)))).mels, data)
        assert (which // 2).tolist() == expected
    path = pipe.interpolate(data[2:3], data[3:4], 2, "kick", output_type="mel").mels
    torch.testing.assert_close(path, data[2:4], atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"class_labels holds 'Tom': labels are 0 to 2, or snare, kick, tom."):
        pipe(class_labels=["tom", "Tom"])
    with pytest.raises(ValueError, match=r"class_labels holds 'tom': labels are 0 to 2."):
        make_pipe(classes=3)(class_labels="tom")
    for wrong in ({"kick": 0}, {"a": 0, "b": 1, "c": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(ValueError, match=r"label2id is .*: name each of the network's 3 classes"):
            make_pipe(classes=3, label2id=wrong)


@pytest.mark.parametrize("kind", ["sample", "edm"])
def test_guidance_extrapolates_the_denoised_sample(mel, data, kind):
    """One step from noise is the denoised sample itself."""
    network = exact(data, 128, 3, kind)
    pipe = quiet(MelPFGMPipeline(network, PoissonFlowScheduler(prediction_type=kind), mel))
    noise = pipe.prepare_noise(1, seeds(0))
    call = dict(num_inference_steps=1, latents=noise, output_type="mel")
    sigma = torch.tensor([80.0], dtype=torch.float64)
    null, label = (network.denoise(80 * noise.double(), sigma, torch.tensor([c])) for c in (3, 1))
    for scale in (0, 1, 2.5):
        expected = null + scale * (label - null)
        torch.testing.assert_close(
            pipe(class_labels=1, guidance_scale=scale, **call).mels, expected.float(), atol=1e-4, rtol=1e-4
        )
    assert (null - label).abs().max() > 0.1


def test_guidance_of_fields_is_that_of_denoisers(random_pipe, mel):
    """A PFGM network and the denoiser inside of it, guided, make the same sound."""
    torch.manual_seed(1)
    field = UNet2DModel.from_config({**random_pipe.unet.config, "out_channels": 2}).eval()
    torch.nn.init.constant_(field.conv_out.bias, -2.0)  # the last component of a field is negative
    field.class_embedding.weight.data *= 30
    scheduler = PoissonFlowScheduler(aug_dim=1, prediction_type="field", sigma_max=2.0)
    pipe = quiet(MelPFGMPipeline(field, scheduler, mel))
    noise = torch.randn(2, 1, 16, 32)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        outputs = [field(noise, t, torch.tensor([c, c])).sample for c in (3, 0)]
    null, label = (scheduler.precondition_outputs(noise, output, 2.0) for output in outputs)
    expected = null + 3 * (label - null)
    mels = pipe(2, 0, 1, 3.0, latents=noise / 2, output_type="mel").mels
    torch.testing.assert_close(mels, expected, rtol=1e-4, atol=1e-4)
    of_outputs = scheduler.precondition_outputs(noise, outputs[0] + 3 * (outputs[1] - outputs[0]), 2.0)
    assert (of_outputs - expected).abs().max() > 0.01


# Given sound


def test_strength(make_pipe, sounds, data):
    pipe = make_pipe()
    same = pipe(audio=sounds[:2], strength=0, generator=seeds(0, 1), output_type="pt")
    assert torch.equal(same.audios, sounds[:2]) and torch.equal(same.mels, data[:2])
    free = [pipe(audio=sounds[i], strength=1, generator=seeds(5)).audios for i in (0, 3)]
    np.testing.assert_array_equal(free[0], free[1])
    np.testing.assert_array_equal(free[0], pipe(generator=seeds(5)).audios)
    some, generators = {}, seeds(*range(16))
    for strength in (0.4, 0.8):
        mels = pipe(16, audio=sounds[3], strength=strength, generator=generators, output_type="mel").mels
        some[strength] = (nearest(mels, data)[0] == 3).float().mean()
    assert some[0.4] == 1 > some[0.8]


@pytest.fixture
def four_endings():
    """Mels of which the first 24 frames leave two ways to go on: sounds 0 and 1 begin alike, so do 2 and 3."""
    noise = torch.Generator().manual_seed(0)
    beginnings = torch.rand(2, 1, 16, 24, generator=noise) * 2 - 1
    endings = torch.rand(4, 1, 16, 8, generator=noise) * 2 - 1
    return torch.cat([beginnings.repeat_interleave(2, 0), endings], dim=3)


@pytest.mark.parametrize("aug_dim", [1, 128, None])
@pytest.mark.parametrize("solver", ["dpmsolver++", "heun", "rk45"])
def test_continuations_fit_what_is_kept(make_pipe, four_endings, aug_dim, solver):
    mask = torch.arange(32) >= 24
    pipe = make_pipe(aug_dim, data=four_endings, solver_type=solver)
    mels = pipe(32, audio=four_endings[2:3], mask=mask, generator=seeds(*range(32)), output_type="mel").mels
    assert torch.equal(mels[..., :24], four_endings[2:3, ..., :24].expand(32, -1, -1, -1))
    which, distance = nearest(mels, four_endings)
    right = (which >= 2) & (distance < 1e-3)
    assert right.sum() >= 30
    assert 6 <= (which == 2).sum() <= 26


@pytest.mark.parametrize("loop", [False, True])
def test_kept_samples_come_back(make_pipe, sounds, mel, loop):
    start, end = 0.09, 0.17
    new, fade = slice(720, 1360), mel.config.n_fft // 2
    results = [
        make_pipe()(2, audio=sounds[:2], mask=[(start, end)], loop=loop, generator=seeds(i, i + 1), output_type="pt")
        for i in (0, 2)
    ]
    for result in results:
        audios = result.audios[:, :2047]
        assert torch.equal(audios[:, : new.start - fade], sounds[:2, : new.start - fade])
        assert torch.equal(audios[:, new.stop + fade :], sounds[:2, new.stop + fade :])
        assert not torch.equal(
            audios[:, new.start - fade + 8 : new.start], sounds[:2, new.start - fade + 8 : new.start]
        )
        # No jump where the one becomes the other
        for edge in (new.start - fade, new.stop + fade):
            assert audios.diff().abs()[:, edge - 4 : edge + 4].max() < sounds[:2].diff().abs().max()
    assert (results[0].audios - results[1].audios)[:, new].abs().max() > 0.05
    assert torch.equal(results[0].audios[:, : new.start - fade], results[1].audios[:, : new.start - fade])


def test_spans_and_frames_say_the_same(make_pipe, sounds):
    # Frame i is nearest to the samples from 64 i - 32 on.
    spans, frames = [(608 / 8000, 1120 / 8000)], torch.zeros(32, dtype=torch.bool)
    frames[10:18] = True
    results = [make_pipe()(audio=sounds[0], mask=mask, generator=seeds(0)).audios for mask in (spans, frames)]
    np.testing.assert_array_equal(*results)
    nothing = make_pipe()(audio=sounds[0], mask=[False] * 32, generator=seeds(0), output_type="pt")
    assert torch.equal(nothing.audios[0], sounds[0])


def test_what_is_made_is_as_loud_as_what_is_kept(sounds):
    """Also where 0 dB is the loudest bin of each waveform, so that a mel does not say how loud it is."""
    mel = MelSpectrogram(8000, 256, 64, 16, 32, ref="slice")
    quietly = sounds[1:2] / 20
    pipe = quiet(MelPFGMPipeline(exact(mel.encode(quietly)), PoissonFlowScheduler(prediction_type="sample"), mel))
    made = pipe(audio=quietly, mask=[(0.09, 0.17)], generator=seeds(0), output_type="pt").audios[:, 720:1360]
    assert 0.7 < made.norm() / quietly[:, 720:1360].norm() < 1.4


# Loops


def test_loops_commute_with_rotation(random_pipe):
    """On a ring no place is special: turned noise makes the same sound, turned."""
    latents = random_pipe.prepare_noise(2, seeds(0, 1))
    for loop in (True, False):
        mels = random_pipe(latents=latents, loop=loop, output_type="mel").mels
        turned = random_pipe(latents=latents.roll(10, -1), loop=loop, output_type="mel").mels.roll(-10, -1)
        difference = (mels - turned).abs().max()
        assert difference < 1e-3 if loop else difference > 0.05
    after = random_pipe(latents=latents, output_type="mel").mels
    assert torch.equal(after, mels)  # nothing stays behind in the network


def treble_around_the_seam(loops):
    """The power above all partials when the loops are played twice: around the seam, and the most anywhere else."""
    frames = torch.cat([loops, loops], 1).unfold(1, 64, 1) * torch.hann_window(64)
    treble = torch.fft.rfft(frames)[..., 26:].abs().square().sum(-1)
    seam = loops.shape[1] - 32
    return treble[:, seam - 32 : seam + 32].amax(1), treble[:, 64 : seam - 64].amax(1)


def test_loops_have_no_click(mel):
    """Steady tones: played over and over, the seam sounds like any other place."""
    time = torch.arange(mel.slice_samples) / 8000
    tones = 0.3 * torch.sin(2 * math.pi * torch.tensor([[437.0], [610.0], [899.0]]) * time)
    steady = mel.encode(tones)[..., 16:17].expand(-1, -1, -1, 32).contiguous()
    pipe = quiet(MelPFGMPipeline(exact(steady), PoissonFlowScheduler(prediction_type="sample"), mel))
    loops = pipe(12, loop=True, generator=seeds(*range(12)), output_type="pt").audios
    assert loops.shape == (12, 32 * 64)
    plain = pipe(12, generator=seeds(*range(12)), output_type="pt").audios
    for sounds, clicks in ((loops, False), (plain, True)):
        seam, elsewhere = treble_around_the_seam(sounds)
        assert (seam > 100 * elsewhere if clicks else seam < 1.5 * elsewhere).all()


def test_a_loop_is_edited_as_a_loop(make_pipe):
    pipe = make_pipe()
    loop = pipe(loop=True, generator=seeds(0)).audios
    again = pipe(audio=loop, mask=[(0.1, 0.15)], loop=True, generator=seeds(1)).audios
    assert again.shape == loop.shape
    np.testing.assert_array_equal(again[:, :600], loop[:, :600])
    # New sound at the end fades into what is kept at the beginning.
    over_the_seam = pipe(audio=loop, mask=[(0.226, 0.256)], loop=True, generator=seeds(1)).audios
    assert not np.array_equal(over_the_seam[:, :64], loop[:, :64])
    np.testing.assert_array_equal(over_the_seam[:, 129:1600], loop[:, 129:1600])


# The path upwards


@pytest.mark.parametrize("aug_dim", [1, 128, None])
def test_inversion_is_undone_by_sampling(make_pipe, data, aug_dim):
    pipe = make_pipe(aug_dim)
    near = data[:2] + 0.002 * torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(0))
    for given in (near, data[:2]):
        latents = pipe.invert(given)
        assert latents.flatten(1).norm(dim=1).max() < 1.2 * math.sqrt(512)
        back = pipe(latents=latents, num_inference_steps=100, output_type="mel").mels
        torch.testing.assert_close(back, data[:2], atol=1e-4, rtol=0)
    # The direction carries the sound: another latent leads elsewhere.
    other = pipe(latents=latents.flip(0), num_inference_steps=100, output_type="mel").mels
    torch.testing.assert_close(other, data[:2].flip(0), atol=1e-4, rtol=0)


def test_inversion_of_a_gaussian(make_pipe):
    """x(sigma) = x(0) sqrt((s^2 + sigma^2) / s^2)."""
    pipe = quiet(MelPFGMPipeline(GaussianDenoiser(0.5), PoissonFlowScheduler(aug_dim=None, prediction_type="sample")))
    picture = torch.randn(3, 1, 4, 4) * 0.5
    latents = pipe.invert(picture)
    expected = picture * math.sqrt((0.25 + 80**2) / (0.25 + 0.002**2)) / 80
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pipe.invert(picture), latents)
    pipe.scheduler.set_timesteps(sigmas=[20.0, 1.0])  # what a person does with the scheduler does not matter
    assert torch.equal(pipe.invert(picture), latents)
    back = pipe(latents=latents, num_inference_steps=200, output_type="mel").images
    torch.testing.assert_close(back, picture, rtol=2e-3, atol=1e-4)


def test_interpolation(make_pipe, sounds, data):
    pipe = make_pipe()
    result = pipe.interpolate(sounds[0], sounds[4], 5, generator=seeds(0, 1, 2, 3, 4))
    mels = torch.as_tensor(result.mels)
    torch.testing.assert_close(mels[[0, -1]], data[[0, 4]], atol=1e-3, rtol=0)
    assert nearest(mels, data)[1].max() < 1e-4  # denoised, also in between
    assert result.audios.shape == (5, sounds.shape[1])
    same = pipe.interpolate(sounds[1], sounds[1], 3, output_type="mel").mels
    torch.testing.assert_close(same, data[1:2].expand(3, -1, -1, -1), atol=1e-3, rtol=0)


def test_interpolation_of_a_gaussian():
    """There the flow only scales, so what is seen is the path of the noise: a great circle and a geometric norm."""
    pipe = quiet(MelPFGMPipeline(GaussianDenoiser(0.5), PoissonFlowScheduler(aug_dim=None, prediction_type="sample")))
    a, b = torch.zeros(2, 1, 1, 4, 4)
    a[0, 0, 0, 0], b[0, 0, 0, 1] = 1, 4
    path = pipe.interpolate(a, b, 4, output_type="mel").images.flatten(1)
    angles = torch.atan2(path[:, 1], path[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(path.norm(dim=1), 4 ** torch.linspace(0, 1, 4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_log_likelihood_of_a_gaussian(divergence):
    """The divergence of a linear flow is the same for every probe of signs."""
    scheduler = PoissonFlowScheduler(aug_dim=None, prediction_type="sample", sigma_max=200)
    pipe = quiet(MelPFGMPipeline(GaussianDenoiser(0.5), scheduler))
    picture = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5
    result = pipe.log_likelihood(picture, divergence=divergence)
    spread = torch.tensor(0.25 + 0.002**2, dtype=torch.float64).sqrt()
    expected = torch.distributions.Normal(0.0, spread).log_prob(picture.double()).flatten(1).sum(1)
    torch.testing.assert_close(result.log_likelihood, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(result.bits_per_dimension, -expected / 16 / math.log(2), atol=2e-4, rtol=0)


# The same with other schedulers: those of diffusers for DDPM, and score SDEs


@pytest.mark.parametrize(("solver", "kind", "options"), [
    (DDPMScheduler, "epsilon", dict(clip_sample=False)),
    (DDIMScheduler, "v_prediction", dict(clip_sample=False, timestep_spacing="trailing")),
    (DPMSolverMultistepScheduler, "v_prediction", dict(timestep_spacing="trailing")),
    (UniPCMultistepScheduler, "epsilon", dict(timestep_spacing="trailing")),
])  # fmt: skip
def test_schedulers_of_ddpm(solver, kind, options, mel, data):
    """Generation, classes, guidance, variations and inpainting."""
    scheduler = solver(prediction_type=kind, **options)
    pipe = quiet(MelPFGMPipeline(exact_noise(data, scheduler, 3, kind), scheduler, mel))
    call = dict(num_inference_steps=50, output_type="mel")
    labels = [0, 1, 2, 0, 1, 2]
    mels = pipe(class_labels=labels, generator=seeds(*range(6)), **call).mels
    which, distance = nearest(mels, data)
    assert (which // 2).tolist() == labels and distance.max() < 0.02
    alone = pipe(class_labels=labels[4], generator=seeds(4), **call).mels
    torch.testing.assert_close(alone, mels[4:5], atol=1e-4, rtol=0)
    without, _ = nearest(pipe(24, generator=seeds(*range(24)), **call).mels, data)
    assert len((without // 2).unique()) == 3
    # Guidance between "all sounds" and one class of two ends in that class, and exaggerates on the way.
    guided = pipe(class_labels=1, guidance_scale=1.5, generator=seeds(0), **call).mels
    assert nearest(guided, data)[0].item() // 2 == 1
    near = pipe(6, audio=data[3:4], strength=0.2, generator=seeds(*range(6)), **call).mels
    assert (nearest(near, data)[0] == 3).all()
    mask = torch.arange(32) >= 24
    filled = pipe(4, audio=data[4:5], mask=mask, generator=seeds(*range(4)), **call).mels
    assert torch.equal(filled[..., :24], data[4:5, ..., :24].expand(4, -1, -1, -1))
    assert (nearest(filled, data)[0] == 4).all() and nearest(filled, data)[1].max() < 0.05
    for backwards in (pipe.invert, pipe.log_likelihood, lambda audio: pipe.interpolate(audio, audio, 2)):
        with pytest.raises(ValueError, match=f"{solver.__name__} cannot run backwards: only a network") as error:
            backwards(data[:1])
        assert "\n" not in str(error.value)


SDES = {
    "ve": dict(sde="ve", sampling_eps=1e-5, solver_type="heun"),
    "vp": dict(sde="vp", solver_type="heun"),
    "subvp": dict(sde="subvp", solver_type="heun"),
}


@pytest.mark.parametrize("kind", ["epsilon", "score"])
@pytest.mark.parametrize("sde", SDES)
def test_inversion_and_interpolation_of_score_sdes(sde, kind, mel, data, sounds):
    scheduler = ScoreSDEScheduler(**SDES[sde], prediction_type=kind)
    pipe = quiet(MelPFGMPipeline(exact_noise(data, scheduler, 3, kind), scheduler, mel))
    latents = pipe.invert(sounds[2:4], 1)
    assert latents.flatten(1).norm(dim=1).max() < 1.3 * math.sqrt(512)
    path = pipe.interpolate(sounds[2], sounds[3], 3, class_labels=1, generator=seeds(0, 1, 2))
    torch.testing.assert_close(torch.as_tensor(path.mels)[[0, 2]], data[2:4], atol=2e-3, rtol=0)
    assert path.audios.shape == (3, sounds.shape[1])


@pytest.mark.parametrize("sde", SDES)
def test_score_sdes_of_a_gaussian(sde):
    """x(t) = x(0) sqrt(V(t) / V(0)), and the likelihood of a Gaussian."""
    scheduler = ScoreSDEScheduler(**SDES[sde])
    network = GaussianNoise(0.5)
    network.marginal = noise_of(scheduler)
    pipe = quiet(MelPFGMPipeline(network, scheduler))
    picture = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5
    times = torch.tensor([scheduler.config.sampling_eps, 1.0], dtype=torch.float64)
    mean, std = scheduler.equation.marginal(times)
    start, end = (mean**2 * 0.25 + std**2).tolist()
    latents = pipe.invert(picture)
    unit = scheduler.init_noise_sigma
    expected = picture * math.sqrt(end / start) / unit
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4 * math.sqrt(end) / unit)
    back = pipe(latents=latents, num_inference_steps=300, output_type="mel").images
    posterior_mean = mean[0].item() * 0.25 / start * picture
    torch.testing.assert_close(back, posterior_mean, rtol=3e-3, atol=1e-4)
    result = pipe.log_likelihood(picture, divergence="exact")
    expected = torch.distributions.Normal(0.0, math.sqrt(start)).log_prob(picture.double()).flatten(1).sum(1)
    torch.testing.assert_close(result.log_likelihood, expected, atol=3e-3, rtol=0)
    torch.testing.assert_close(result.bits_per_dimension, -expected / 16 / math.log(2), atol=3e-4, rtol=0)
    estimate = pipe.log_likelihood(picture, generator=seeds(0, 1, 2)).log_likelihood
    torch.testing.assert_close(estimate, result.log_likelihood, atol=1e-3, rtol=0)  # linear: exact for any signs


# Bad input


@pytest.mark.parametrize(("call", "message"), [
    (dict(audio=torch.zeros(1000), strength=0.5), "audio has 1000 samples, but the model sees 2047"),
    (dict(audio=torch.zeros(1, 1, 8, 32), strength=0.5), r"audio has shape \(1, 1, 8, 32\)"),
    (dict(audio=torch.zeros(2047)), "not what to do with it: add strength"),
    (dict(audio=torch.zeros(2047), strength=1.5), "strength is 1.5: it must lie between 0"),
    (dict(strength=0.5), "strength needs the audio"),
    (dict(mask=[(0, 1)]), "mask needs the audio"),
    (dict(audio=torch.zeros(2047), mask=[True] * 30), r"mask has shape \(30,\): give one boolean for each of 32"),
    (dict(audio=torch.zeros(2047), mask=[1.0] * 32), "mask holds torch.float32: give booleans"),
    (dict(audio=torch.zeros(2047), mask=[(0.2, 0.3)]), r"mask holds \(0.2, 0.3\) s: use 0 <= start < end <= 0.25"),
    (dict(class_labels=[3]), "class_labels holds 3: labels are 0 to 2"),
    (dict(class_labels=[-1]), "class_labels holds -1: labels are 0 to 2"),
    (dict(batch_size=3, class_labels=[0, 1]), "class_labels has 2 entries for a batch of 3"),
    (dict(guidance_scale=3.0), "guidance_scale is 3.0, but there are no class_labels"),
    (dict(batch_size=3, generator=seeds(0, 1)), "generator has 2 entries for a batch of 3"),
    (dict(generator=seeds(0, 1)), "generator has 2 entries for a batch of 1"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(temperature=0), "temperature is 0"),
    (dict(num_inference_steps=0), "num_inference_steps is 0"),
    (dict(latents=torch.zeros(1, 1, 16, 16)), "latents have shape"),
    (dict(output_type="wav"), "output_type is 'wav'"),
    (dict(callback_on_step_end_tensor_inputs=["mel"]), "callback_on_step_end_tensor_inputs holds 'mel'"),
])  # fmt: skip
def test_bad_input(random_pipe, call, message):
    with pytest.raises(ValueError, match=message) as error:
        random_pipe(**call)
    assert "\n" not in str(error.value)


def test_bad_input_of_other_pipelines(random_pipe, mel, sounds):
    pictures = quiet(MelPFGMPipeline(GaussianDenoiser(0.5), PoissonFlowScheduler(prediction_type="sample")))
    with pytest.raises(ValueError, match="audio is a waveform, but there is no mel"):
        pictures(audio=sounds, strength=0.5)
    with pytest.raises(ValueError, match="there are no seconds without a mel"):
        pictures(audio=torch.zeros(1, 1, 4, 4), mask=[(0, 1)])
    with pytest.raises(ValueError, match="but the network has no classes"):
        pictures(class_labels=0)
    with pytest.raises(ValueError, match="EDMEulerScheduler cannot run backwards"):
        MelPFGMPipeline(random_pipe.unet, EDMEulerScheduler(), mel).invert(sounds)
    with pytest.raises(ValueError, match="use n >= 2"):
        random_pipe.interpolate(sounds[0], sounds[1], 1)
    with pytest.raises(ValueError, match="A vocoder needs a mel of method 'bigvgan'"):
        MelPFGMPipeline(random_pipe.unet, random_pipe.scheduler, mel, GaussianDenoiser(1.0))
