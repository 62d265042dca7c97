"""A small mel, a few sounds, and pipelines for them."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from exact_networks import exact, quiet
from small_t5 import small_text_encoder, small_tokenizer

from tonefield import LatentAudioDiffusionPipeline, MelPFGMPipeline, MelSpectrogram, PoissonFlowScheduler


@pytest.fixture(scope="session")
def mel():
    return MelSpectrogram(sample_rate=8000, n_fft=256, hop_length=64, n_mels=16, num_frames=32)


@pytest.fixture(scope="session")
def sounds(mel):
    """Six sounds of two partials each, of 2047 samples."""
    time = torch.arange(mel.slice_samples) / 8000
    pitches = torch.tensor([200.0, 330, 520, 800, 1300, 2100])[:, None]
    swell = 0.5 + 0.5 * torch.cos(2 * math.pi * torch.tensor([2.0, 3, 4, 5, 6, 7])[:, None] * time)
    return 0.3 * swell * (torch.sin(2 * math.pi * pitches * time) + torch.sin(2 * math.pi * 1.5 * pitches * time))


@pytest.fixture(scope="session")
def data(mel, sounds):
    return mel.encode(sounds)


@pytest.fixture
def make_pipe(mel, data):
    """A pipeline whose network knows the sounds exactly."""

    def make(aug_dim=128, classes=None, data=data, mel=mel, label2id=None, **scheduler):
        scheduler = PoissonFlowScheduler(aug_dim=aug_dim, prediction_type="sample", **scheduler)
        return quiet(MelPFGMPipeline(exact(data, aug_dim, classes), scheduler, mel, label2id=label2id))

    return make


@pytest.fixture
def random_pipe(mel):
    """A pipeline with a real network of random weights, three classes and the null class."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=(16, 32), in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, num_class_embeds=4,
    )  # fmt: skip
    return quiet(MelPFGMPipeline(unet.eval(), PoissonFlowScheduler(), mel))


@pytest.fixture(scope="session")
def words():
    """A tokenizer and a text encoder."""
    tokenizer = small_tokenizer(["a low tone", "a high tone", "slow piano", "fast drums and bass"])
    return tokenizer, small_text_encoder(tokenizer)


@pytest.fixture(scope="session")
def vae():
    """An autoencoder of random weights: four channels, half as high and half as wide as a mel."""
    torch.manual_seed(1)
    return AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 16), latent_channels=4, norm_num_groups=4,
        sample_size=16, scaling_factor=1.3, shift_factor=0.1,
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def text_unet():
    torch.manual_seed(2)
    return UNet2DConditionModel(
        (8, 16), 4, 4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=16, norm_num_groups=4, attention_head_dim=8,
    ).eval()  # fmt: skip


@pytest.fixture
def text_pipe(mel, vae, words, text_unet):
    """A pipeline of real networks of random weights that reads text and works on latents."""
    return quiet(LatentAudioDiffusionPipeline(text_unet, DDIMScheduler(clip_sample=False), mel, vae, *words))
