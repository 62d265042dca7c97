"""Pipelines of audio-diffusion make here what they make in diffusers' own (deprecated) class."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AudioDiffusionPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    Mel,
    UNet2DConditionModel,
    UNet2DModel,
)
from exact_networks import quiet
from safetensors.torch import load_file, save_file

import tonefield
from tonefield import LatentAudioDiffusionPipeline, MelSpectrogram
from tonefield.command_line import UserError, parse
from tonefield.conversion import convert_audio_diffusion
from tonefield.conversion.audio_diffusion import convert, front_end
from tonefield.conversion.command import importer_parser, write


BLOCKS = dict(block_out_channels=(8, 16), norm_num_groups=4)


def pipeline(latent=False, conditional=False, scheduler=DDIMScheduler, **mel):
    torch.manual_seed(0)
    size = (8, 8) if latent else (16, 16)
    if conditional:
        unet = UNet2DConditionModel(
            size, 1, 1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=10,
            attention_head_dim=8, **BLOCKS,
        )  # fmt: skip
    else:
        unet = UNet2DModel(
            size, 1, 1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, attention_head_dim=8, **BLOCKS,
        )  # fmt: skip
    vae = AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, latent_channels=1, **BLOCKS
    ).eval()
    mel = Mel(**dict(x_res=16, y_res=16, sample_rate=8000, n_fft=256, hop_length=64) | mel)
    scheduler = scheduler(clip_sample=not latent)
    mel.image_to_audio = lambda picture: np.zeros(1)  # Griffin-Lim of librosa, of which nothing is compared
    pipe = quiet(AudioDiffusionPipeline(vae if latent else None, unet.eval(), mel, scheduler))
    return pipe, torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))


def grey(images):
    return np.stack([np.array(image, dtype=int) for image in images])


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("conditional", [False, True])
def test_the_same_pictures(tmp_path, latent, conditional):
    theirs, noise = pipeline(latent, conditional)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path / "scheduler" / "scheduler_config.json", clip_sample=True)  # as all of them are saved
    encoding = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(2)) if conditional else None
    images = theirs(2, noise=noise.clone(), steps=5, encoding=encoding).images
    ours = quiet(convert_audio_diffusion(tmp_path))
    call = dict(latents=noise, num_inference_steps=5) | (dict(prompt_embeds=encoding) if conditional else {})
    made = ours(**call, output_type="pil")
    difference = np.abs(grey(made.images) - grey(images))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02 and grey(images).std() > 10
    # The front end is the same as well, and says so when it is saved.
    audio = 0.3 * torch.randn(1, 16 * 64 - 1, generator=torch.Generator().manual_seed(3))
    theirs.mel.load_audio(raw_audio=audio[0].numpy())
    ours.save_pretrained(tmp_path / "again")
    ours = quiet(tonefield.load(tmp_path / "again"))
    heard = grey(ours.mel.to_image(ours.mel.encode(audio)))
    assert np.abs(heard - grey([theirs.mel.audio_slice_to_image(0)])).max() <= 1
    assert ours.scheduler.config.clip_sample is not latent and ours(**call).audios.shape == (2, 16 * 64 - 1)
    if conditional:
        other = ours(**call | dict(prompt_embeds=-encoding), output_type="pil").images
        assert np.abs(grey(other) - grey(images)).max() > 2
        with pytest.raises(ValueError, match="There is no text encoder: give prompt_embeds"):
            ours(latents=noise, num_inference_steps=1)


def test_old_repositories(tmp_path):
    """Pickled weights, attention under its old names, few settings, and a class of another name."""
    theirs, noise = pipeline(latent=True)
    theirs.save_pretrained(tmp_path)
    expected = theirs(2, noise=noise.clone(), steps=5).images
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part in ("unet", "vqvae"):
        file = tmp_path / part / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        for new, name in old.items():
            weights = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in weights.items()}
        assert any(".query." in key for key in weights)
        torch.save(weights, file.with_suffix(".bin"))
        file.unlink()
        config = json.loads((tmp_path / part / "config.json").read_text())
        kept = ("sample_size", "in_channels", "out_channels", "latent_channels", "down_block_types", "up_block_types",
                "layers_per_block", "attention_head_dim", *BLOCKS)  # fmt: skip
        (tmp_path / part / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k in kept}))
    index = json.loads((tmp_path / "model_index.json").read_text())
    index = {"_class_name": "LatentAudioDiffusionPipeline", "_diffusers_version": "0.9.0"} | {
        part: index[part] for part in ("unet", "vqvae", "mel", "scheduler")
    }
    index["mel"] = ["audio_diffusion", "Mel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    mel = json.loads((tmp_path / "mel" / "mel_config.json").read_text())
    del mel["n_iter"], mel["top_db"]
    (tmp_path / "mel" / "mel_config.json").write_text(json.dumps(mel))
    made = quiet(tonefield.load(tmp_path))(latents=noise, num_inference_steps=5, output_type="pil").images
    assert np.abs(grey(made) - grey(expected)).max() <= 1


def test_what_a_mel_does_not_say():
    mel, theirs = front_end({}, None), Mel()
    c = mel.config
    assert (c.num_frames, c.n_mels, c.sample_rate, c.n_fft, c.hop_length, c.top_db) == (
        theirs.x_res, theirs.y_res, theirs.sr, theirs.n_fft, theirs.hop_length, theirs.top_db
    )  # fmt: skip


def test_mels_of_a_vocoder(tmp_path):
    """Which the networks of a fork are trained on: x = 2 (m - ln 1e-5) / (2.1 - ln 1e-5) - 1."""
    theirs, _ = pipeline(y_res=80)
    theirs.unet.register_to_config(sample_size=(80, 16))
    theirs.save_pretrained(tmp_path)
    pipe = quiet(tonefield.load(tmp_path, bigvgan_model="nvidia/bigvgan_v2_22khz_80band_256x"))
    expected = MelSpectrogram.from_preset("bigvgan_v2_22khz_80band_256x", num_frames=16)
    assert pipe.mel.fingerprint() == expected.fingerprint() and pipe.mel.config.num_frames == 16
    assert pipe.mel.value_range == pytest.approx((-11.512925, 2.1))
    with pytest.raises(ValueError, match="trained on mels of 80 bands, but bigvgan_24khz_100band has 100"):
        tonefield.load(tmp_path, bigvgan_model="bigvgan_24khz_100band")
    with pytest.raises(ValueError, match="There is no mel preset 'bigvgan'"):
        tonefield.load(tmp_path, bigvgan_model="bigvgan")
    given = tonefield.load(tmp_path, mel=expected, scheduler=DDPMScheduler())
    assert given.mel is expected and isinstance(given.scheduler, DDPMScheduler)


def command(source, target, *flags):
    parser = importer_parser("")
    parser.add_argument("--bigvgan_model")
    args = parse(parser, [str(source), str(target), *flags])
    write(convert(args), args)


def test_command(tmp_path):
    theirs, noise = pipeline(latent=True, scheduler=DDPMScheduler)
    theirs.save_pretrained(tmp_path / "in")
    command(tmp_path / "in", tmp_path / "out", "--license", "gpl-3.0")
    pipe = quiet(tonefield.load(tmp_path / "out"))
    assert type(pipe) is LatentAudioDiffusionPipeline and pipe.scheduler.config.clip_sample is False
    assert pipe.mel.config.ref == "slice"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: gpl-3.0" in card and "| imported from | in |" in card
    call = dict(num_inference_steps=3, output_type="latent")
    made, again = (
        p(latents=noise, generator=torch.Generator().manual_seed(0), **call).latents
        for p in (pipe, quiet(tonefield.load(tmp_path / "in")))
    )
    assert torch.equal(made, again)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(file, key):
    weights = load_file(file)
    del weights[key]
    save_file(weights, file, {"format": "pt"})


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "model_index.json").unlink(), "holds no model_index.json"),
    (lambda f: (f / "model_index.json").write_text("{"), "cannot be brought in"),
    (lambda f: truncate(f / "unet" / "diffusion_pytorch_model.safetensors"), "cannot be brought in"),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "diffusion_pytorch_model"),
    (lambda f: (f / "mel" / "mel_config.json").unlink(), "mel_config.json"),
    (lambda f: rewrite(f / "model_index.json", unet=["diffusers", "UNet1DModel"]), "has a UNet1DModel as its unet"),
    (lambda f: rewrite(f / "model_index.json", scheduler=["x", "Thing"]), "has a Thing as its scheduler"),
    (lambda f: without(f / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias"),
     "1 tensors of the unet are missing, the first is conv_in.bias"),
    (lambda f: rewrite(f / "unet" / "config.json", layers_per_block=2), "up_blocks.0.resnets.1.conv1.weight"),
    (lambda f: rewrite(f / "unet" / "config.json", block_out_channels=[8, 32]), "cannot be brought in"),
    (lambda f: rewrite(f / "mel" / "mel_config.json", n_fft=16, hop_length=4), "mel bands lie between two bins"),
    (lambda f: rewrite(f / "mel" / "mel_config.json", x_res=32), "The U-Net was made for samples of"),
])  # fmt: skip
def test_bad_folders(tmp_path, damage, message):
    pipeline()[0].save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as error:
        command(tmp_path, tmp_path / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
