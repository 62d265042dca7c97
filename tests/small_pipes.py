"""A small random pipeline of each family, for tests of what works with all of them."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from small_t5 import small_text_encoder, small_tokenizer
from token_networks import random_token_pipe

from tonefield import LatentAudioDiffusionPipeline, MelPFGMPipeline, MelSpectrogram, PoissonFlowScheduler


SMALL = dict(
    sample_size=(16, 16),
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
)


def shaken(model):
    """Weights none of which is zero, so that nothing is without effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def small_mel():
    return MelSpectrogram(sample_rate=8000, n_fft=256, hop_length=128, n_mels=16, num_frames=16, mean=-0.8, std=0.1)


def save_small_pipes(folder: Path) -> dict[str, Path]:
    """Saves a pipeline of each family into a folder of its own: on mels by class, from text, on tokens by class."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, add_attention=False)
    mel_unet = shaken(UNet2DModel(**SMALL, **blocks, num_class_embeds=3))
    names = {"kick": 0, "snare": 1}
    tokenizer = small_tokenizer(["rain on the roof", "wind in the trees"])
    text_unet = shaken(UNet2DConditionModel(
        **SMALL, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], cross_attention_dim=16,
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=2,
    ))  # fmt: skip
    ddim = DDIMScheduler(clip_sample=False, beta_start=1e-4, beta_end=0.02)
    pipes = {
        "mel": MelPFGMPipeline(mel_unet, PoissonFlowScheduler(), small_mel(), label2id=names),
        "text": LatentAudioDiffusionPipeline(
            text_unet, ddim, small_mel(), tokenizer=tokenizer, text_encoder=small_text_encoder(tokenizer)
        ),
        "tokens": random_token_pipe(num_classes=2),
    }
    for name, pipe in pipes.items():
        pipe.save_pretrained(folder / name)
    return {name: folder / name for name in pipes}
