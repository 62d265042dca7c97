"""The U-Net of the published PFGM models (https://huggingface.co/papers/2209.11178), for pictures and spectrograms.

It is the DDPM++ network of the score SDEs (https://huggingface.co/papers/2011.13456), and diffusers' `UNet2DModel` but
for what that one's arguments cannot say. To predict a field it has one output channel more than a sample: the mean of
the last one is the component along the augmented axis. `PoissonFlowScheduler` takes that mean.
"""

import functools
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  by finding it here, diffusers knows how to load
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D


# What the published networks have in common and the arguments can say: sinusoids with sines first whose slowest has
# the frequency 1/10000, one attention head over all channels, and strided convolutions that are padded behind the last
# row and column alone (which diffusers does where it is told not to pad).
DEFAULTS: dict[str, Any] = dict(
    freq_shift=1, flip_sin_to_cos=False, norm_eps=1e-6, norm_num_groups=32, attention_head_dim=None,
    downsample_padding=0,
)  # fmt: skip


class NoiseLevelEmbedding(Timesteps):
    """Sinusoids of the noise level itself (PFGM's z), where our schedulers' timestep is ln(sigma) / 4."""

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.exp(4 * timesteps))


class PFGMUNet2DModel(UNet2DModel):
    r"""
    The network of PFGM for pictures and for mel spectrograms, weight for weight.

    It differs from [`UNet2DModel`] in that

    - the timestep ln(sigma) / 4 is turned into sigma, whose sinusoids it sees;
    - residual blocks and attention return (x + h) / sqrt(2);
    - a residual block that halves or doubles its input has a 1x1 convolution in its shortcut also where the number of
      channels stays (`downsample_type="resnet"`, `upsample_type="resnet"`: BigGAN's blocks);
    - on the way up only the last block of a level is followed by attention;
    - a norm of C channels has min(C / 4, `norm_num_groups`) groups;
    - biases begin at 0, weights with variance 1 / fan_avg, and those that end a residual at almost 0.

    Args:
        arguments: Those of [`UNet2DModel`], by name. The defaults of `freq_shift` (1), `flip_sin_to_cos` (`False`),
            `norm_eps` (1e-6), `attention_head_dim` (`None`) and `downsample_padding` (0) are those of the published
            networks; these were trained on spectrograms in [0, 1], which `center_input_sample=True` centres.
            `out_channels` is `in_channels + 1` for a field.
    """

    @functools.wraps(UNet2DModel.__init__)  # the configuration is read from the signature
    def __init__(self, **arguments: Any):
        arguments = DEFAULTS | arguments
        most_groups = arguments.pop("norm_num_groups")
        # Groups of 4 channels are possible wherever those of the published networks are.
        super().__init__(norm_num_groups=4, **arguments)
        self.register_to_config(norm_num_groups=most_groups)
        self.time_proj = NoiseLevelEmbedding(
            self.config.block_out_channels[0], self.config.flip_sin_to_cos, self.config.freq_shift
        )
        for block in self.up_blocks:
            if isinstance(block, AttnUpBlock2D):
                for i in range(len(block.attentions) - 1):
                    block.attentions[i] = torch.nn.Identity()
        for module in list(self.modules()):
            if isinstance(module, ResnetBlock2D):
                module.output_scale_factor = 2**0.5
                if (module.up or module.down) and module.conv_shortcut is None:
                    module.conv_shortcut = torch.nn.Conv2d(module.in_channels, module.out_channels, kernel_size=1)
            elif isinstance(module, Attention):
                module.rescale_output_factor = 2**0.5
            elif isinstance(module, torch.nn.GroupNorm):
                module.num_groups = min(module.num_channels // 4, most_groups)
        for name, module in self.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                ends_residual = name.endswith(("conv2", "to_out.0", "conv_out"))
                torch.nn.init.xavier_uniform_(module.weight, gain=1e-5 if ends_residual else 1.0)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
