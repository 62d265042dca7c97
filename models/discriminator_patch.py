"""A discriminator that judges patches, for autoencoders of pictures and of mel spectrograms."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class PatchDiscriminator(ModelMixin, ConfigMixin):
    r"""
    The patch discriminator of pix2pix (https://huggingface.co/papers/1611.07004, section 3.2.2): a convolutional
    network whose every output sees one patch of the input, and says whether that patch is real.

    It normalises groups of channels of one sample where pix2pix normalises batches: what it says of a sample does not
    depend on the others, and there are no statistics to be kept.

    Args:
        in_channels (`int`, *optional*, defaults to 1): Channels of the input.
        base_channels (`int`, *optional*, defaults to 64): Channels after the first convolution; doubled by each other.
        num_layers (`int`, *optional*, defaults to 3): How often the input is halved. The patches are 5 samples wide
            after that, 54 before it with 3 layers.
        norm_num_groups (`int`, *optional*, defaults to 8): Groups of channels that are normalised together.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 1, base_channels: int = 64, num_layers: int = 3, norm_num_groups: int = 8
    ):  # fmt: skip
        super().__init__()
        widths = [base_channels * min(2**layer, 8) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for index in range(1, num_layers + 1):
            kernel, stride = (4, 2) if index < num_layers else (3, 1)
            layers += [
                nn.Conv2d(widths[index - 1], widths[index], kernel, stride, 1),
                nn.GroupNorm(norm_num_groups, widths[index]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Judges samples (batch, channels, height, width): one number a patch, above 0 for real."""
        return self.layers(sample)
