"""The U-Net with transformer blocks of the published PFGM models for spectrograms (`sd_64` and `sd_128`).

It is the network of latent diffusion (https://huggingface.co/papers/2112.10752), on the spectrograms themselves and
without a text: diffusers' `UNet2DConditionModel` but for how it is called and for the embedding of the noise level. To
predict a field it has one output channel more than a sample: the mean of the last one is the component along the
augmented axis. `PoissonFlowScheduler` takes that mean.
"""

import functools
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  by finding it here, diffusers knows how to load
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput


class NoiseLevelEmbedding(Timesteps):
    """Sinusoids of the noise level itself (PFGM's z), where our schedulers' timestep is ln(sigma) / 4."""

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.exp(4 * timesteps))


class PFGMTransformerUNet2DModel(UNet2DConditionModel):
    r"""
    PFGM's network with transformer blocks, weight for weight.

    It differs from [`UNet2DConditionModel`] in that

    - it is called as [`UNet2DModel`] is, and its cross-attention, without a text, is a second self-attention;
    - the timestep ln(sigma) / 4 is turned into sigma, whose sinusoids it sees;
    - the first convolution and the sinusoids are as wide as a quarter of `time_embedding_dim`, if that is given.

    Args:
        arguments: Those of [`UNet2DConditionModel`], by name. The defaults of `freq_shift` (1) and `flip_sin_to_cos`
            (`False`) are those of the published networks, that of `cross_attention_dim` is `block_out_channels`.
            `attention_head_dim` is, as in that class, the *number* of heads: as many as channels in the published
            networks. `out_channels` is `in_channels + 1` for a field.
    """

    @functools.wraps(UNet2DConditionModel.__init__)  # the configuration is read from the signature
    def __init__(self, **arguments: Any):
        channels = arguments.get("block_out_channels", (320, 640, 1280, 1280))
        defaults: dict[str, Any] = dict(freq_shift=1, flip_sin_to_cos=False, cross_attention_dim=list(channels))
        super().__init__(**defaults | arguments)
        c = self.config
        first = c.block_out_channels[0]
        embedding_dim = c.time_embedding_dim or 4 * first
        stem = embedding_dim // 4
        self.time_proj = NoiseLevelEmbedding(stem, c.flip_sin_to_cos, c.freq_shift)
        if stem != first:
            block = dict(
                out_channels=first, temb_channels=embedding_dim, dropout=c.dropout, eps=c.norm_eps,
                groups=c.norm_num_groups,
            )  # fmt: skip
            self.conv_in = torch.nn.Conv2d(c.in_channels, stem, kernel_size=3, padding=1)
            self.time_embedding = TimestepEmbedding(stem, embedding_dim)
            self.set_submodule("down_blocks.0.resnets.0", ResnetBlock2D(in_channels=stem, **block))
            # The last block of all is shown what the first convolution made, beside what comes from below.
            last = f"up_blocks.{len(self.up_blocks) - 1}.resnets.{c.layers_per_block}"
            below = self.get_submodule(last).in_channels - first
            self.set_submodule(last, ResnetBlock2D(in_channels=below + stem, **block))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The noisy samples.
            timestep (`torch.Tensor`): ln(sigma) / 4, one for all or one per sample.
            class_labels (`torch.Tensor`, *optional*): Labels, with `num_class_embeds`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `UNet2DConditionOutput`.
        """
        no_text: Any = None  # the annotation in diffusers leaves it out
        return super().forward(sample, timestep, no_text, class_labels=class_labels, return_dict=return_dict)
