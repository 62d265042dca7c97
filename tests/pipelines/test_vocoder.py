"""Both mel pipelines speak through the vocoder that they have: in all ways to make sound, saved and loaded."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, MMAudioVocoder, UNet2DModel
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from exact_networks import quiet
from published_vocoders import write_bigvgan

import tonefield
from tonefield import LatentAudioDiffusionPipeline, MelPFGMPipeline, MelSpectrogram, PoissonFlowScheduler
from tonefield.models import load_vocoder
from tonefield.pipelines.tonefield_mel_editing import receptive_field


MEL = dict(sample_rate=8000, n_fft=64, hop_length=8, n_mels=16, num_frames=32, method="bigvgan", mean=-0.2, std=0.6)
KINDS = {"first": LTX2Vocoder, "second": MMAudioVocoder}
PIPELINES = {"flow": MelPFGMPipeline, "diffusion": LatentAudioDiffusionPipeline}
SECONDS = 32 * 8 / 8000


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published folder of each generation, and what its vocoder makes of mels."""
    folder = tmp_path_factory.mktemp("published")
    return {kind: (folder / kind, write_bigvgan(folder / kind, kind == "second")) for kind in KINDS}


def pipeline(kind, vocoder=None, **mel):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=(16, 32), in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    ).eval()  # fmt: skip
    scheduler = PoissonFlowScheduler() if kind == "flow" else DDIMScheduler(clip_sample=False)
    mel = MelSpectrogram(**MEL | mel)
    return quiet(PIPELINES[kind](unet, scheduler, mel, vocoder=vocoder))


def log_mels(mels):
    low, high = math.log(1e-5), 2.1
    return (torch.as_tensor(mels)[:, 0].double() * 0.6 - 0.2).clamp(-1, 1) * (high - low) / 2 + (high + low) / 2


WAYS = {
    "generation": {},
    "long": dict(audio_length_in_s=2.7 * SECONDS),
    "continuous": dict(audio_length_in_s=2.7 * SECONDS, continuous=True),
    "variation": dict(strength=0.5),
}


@pytest.mark.parametrize("vocoder", KINDS)
@pytest.mark.parametrize(
    ("kind", "way"), [("flow", "generation"), ("flow", "variation"), *[("diffusion", way) for way in WAYS]]
)
def test_the_sound_is_the_vocoders(published, monkeypatch, vocoder, kind, way):
    monkeypatch.setattr("tonefield.pipelines.tonefield_mel_editing.FRAMES_AT_ONCE", 48)
    folder, speak = published[vocoder]
    pipe, call = pipeline(kind, load_vocoder(folder)), dict(WAYS[way])
    if way == "variation":
        call["audio"] = 0.3 * np.sin(np.arange(256) / 3, dtype=np.float32)
    made = pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0), **call)
    expected = speak(log_mels(made.mels))[:, 0, : made.audios.shape[1]].numpy()
    assert made.audios.shape[1] == round(call.get("audio_length_in_s", SECONDS) * 8000) and expected.std() > 0.05
    np.testing.assert_allclose(made.audios, expected, atol=2e-5)


@pytest.mark.parametrize("kind", PIPELINES)
def test_what_is_mended_is_the_vocoders(published, kind):
    folder, speak = published["second"]
    audio = 0.3 * np.sin(np.arange(256) / 3, dtype=np.float32)
    made = pipeline(kind, load_vocoder(folder))(
        num_inference_steps=3, generator=torch.Generator().manual_seed(0), audio=audio, mask=[(0.01, 0.02)]
    )
    np.testing.assert_array_equal(made.audios[0, 200:], audio[200:])
    new, expected = made.audios[0, 80:160], speak(log_mels(made.mels))[0, 0, 80:160].numpy()
    gain = 1.0 if kind == "flow" else (new @ expected) / (expected @ expected)  # as loud as what is kept
    np.testing.assert_allclose(new, gain * expected, atol=2e-5)


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_loop_is_a_ring_for_the_vocoder(tmp_path, kind):
    """Also for one that sees farther than the windows of the mel reach."""
    speak = write_bigvgan(tmp_path, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8])
    vocoder = load_vocoder(tmp_path)
    assert receptive_field(vocoder) > 4 * 64 / 16
    made = pipeline(kind, vocoder, hop_length=16)(
        num_inference_steps=3, generator=torch.Generator().manual_seed(0), loop=True
    )
    around = speak(log_mels(made.mels).repeat(1, 1, 3))[:, 0].chunk(3, dim=1)[1].numpy()
    np.testing.assert_allclose(made.audios, around, atol=2e-6)


def test_samples_do_not_depend_on_the_batch(published):
    pipe = pipeline("flow", load_vocoder(published["first"][0]))
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    three = pipe(3, num_inference_steps=2, generator=generators).audios
    alone = pipe(1, num_inference_steps=2, generator=torch.Generator().manual_seed(2)).audios
    np.testing.assert_allclose(alone[0], three[2], atol=1e-4)


# Saved, loaded, by name


@pytest.mark.parametrize("vocoder", KINDS)
@pytest.mark.parametrize("kind", PIPELINES)
def test_saved_with_the_pipeline(published, tmp_path, kind, vocoder):
    pipe = pipeline(kind, load_vocoder(published[vocoder][0]))
    pipe.save_pretrained(tmp_path)
    call = dict(num_inference_steps=2)
    expected = pipe(generator=torch.Generator().manual_seed(0), **call).audios
    loaded = quiet(tonefield.load(tmp_path))
    assert type(loaded.vocoder) is KINDS[vocoder] and loaded.vocoder.config._mel == pipe.vocoder.config._mel
    # Where weights lie in memory may decide how a processor adds: equal but for last digits.
    made = loaded(generator=torch.Generator().manual_seed(0), **call).audios
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-6)
    # In half precision the vocoder stays as exact as it is.
    half = quiet(tonefield.load(tmp_path, dtype=torch.bfloat16))
    assert half.unet.dtype == torch.bfloat16 and half.vocoder.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(pipe.vocoder.parameters(), half.vocoder.parameters(), strict=True))
    made = half(generator=torch.Generator().manual_seed(0), **call)
    rounded = quiet(tonefield.load(tmp_path)).to(torch.bfloat16)
    assert rounded(generator=torch.Generator().manual_seed(0), **call).audios.dtype == np.float32
    speak = published[vocoder][1]
    np.testing.assert_allclose(made.audios, speak(log_mels(made.mels))[:, 0].numpy(), atol=2e-5)


@pytest.mark.parametrize("vocoder", KINDS)
def test_loaded_with_a_vocoder_by_name(published, tmp_path, vocoder):
    pipeline("flow").save_pretrained(tmp_path / "pipe")
    folder, speak = published[vocoder]
    load_vocoder(folder).save_pretrained(tmp_path / "converted")
    for name in (folder, str(tmp_path / "converted")):
        pipe = quiet(tonefield.load(tmp_path / "pipe", vocoder=name))
        made = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(made.audios, speak(log_mels(made.mels))[:, 0].numpy(), atol=2e-5)
    pipeline("flow", load_vocoder(folder)).save_pretrained(tmp_path / "other")
    other = "second" if vocoder == "first" else "first"
    assert type(tonefield.load(tmp_path / "other", vocoder=published[other][0]).vocoder) is KINDS[other]
    assert tonefield.load(tmp_path / "other", vocoder=None).vocoder is None
    within = load_vocoder(tmp_path / "other", subfolder="vocoder")
    assert all(torch.equal(a, b) for a, b in zip(within.parameters(), load_vocoder(folder).parameters(), strict=True))


@pytest.mark.parametrize("kind", PIPELINES)
def test_other_mels_are_refused(published, tmp_path, kind):
    vocoder = load_vocoder(published["first"][0])
    message = "reads mels of n_fft=64, but those of the pipeline have n_fft=128: use a vocoder of such mels"
    with pytest.raises(ValueError, match=message):
        pipeline(kind, vocoder, n_fft=128)
    pipe = pipeline(kind, n_fft=128)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        tonefield.load(tmp_path, vocoder=published["first"][0])
    pipe.vocoder = vocoder
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=1)
    pipe.vocoder = pipe.unet
    with pytest.raises(ValueError, match="UNet2DModel is no vocoder of mels: use an MMAudioVocoder or an LTX2Vocoder"):
        pipe(num_inference_steps=1)
