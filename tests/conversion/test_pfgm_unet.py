"""The PFGM networks with published weights compute what the published networks do."""

import pytest
import torch
from published_networks import Weights, ddpmpp, transformer_unet

from tonefield import PFGMTransformerUNet2DModel, PFGMUNet2DModel
from tonefield.conversion import convert_pfgm_unet


def ddpmpp_unet(channels, size, nf, multipliers, blocks, attention, biggan, centered):
    """Our network for the settings of a published one."""
    attention = [level in attention for level in range(len(multipliers))]
    kind = "Resnet{}sampleBlock2D" if biggan else "{}Block2D"
    return PFGMUNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels + 1,
        center_input_sample=not centered,
        block_out_channels=[nf * multiplier for multiplier in multipliers],
        layers_per_block=blocks,
        down_block_types=["AttnDownBlock2D" if here else kind.format("Down") for here in attention],
        up_block_types=["AttnUpBlock2D" if here else kind.format("Up") for here in reversed(attention)],
        downsample_type="resnet" if biggan else "conv",
        upsample_type="resnet" if biggan else "conv",
    )


def transformer(channels, size, nf, multipliers, blocks, attention):
    levels = range(len(multipliers))
    return PFGMTransformerUNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels + 1,
        time_embedding_dim=4 * nf,
        block_out_channels=[nf * multiplier for multiplier in multipliers],
        layers_per_block=blocks,
        down_block_types=["CrossAttnDownBlock2D" if level in attention else "DownBlock2D" for level in levels],
        up_block_types=["CrossAttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(levels)],
        attention_head_dim=[nf * multiplier for multiplier in multipliers],
    )


def outputs(unet, x, z):
    with torch.no_grad():
        output = unet.eval()(x, z.log() / 4).sample
    return output[:, :-1], output[:, -1].mean((1, 2))


# From the description, in double precision: nf, multipliers, blocks, levels with attention, BigGAN's blocks, centred.
DDPMPP = {
    "deep": (16, (1, 1, 2), 2, {1}, True, False),
    "attention everywhere": (8, (1, 3), 1, {0, 1}, True, True),
    "no attention": (16, (1, 3), 2, set(), False, False),
    "attention, plain blocks": (16, (1, 2), 1, {1}, False, True),
}
TRANSFORMERS = {
    "stem as wide as the first level": (32, (1, 2), 1, {1}),
    "narrow stem": (32, (2, 3, 1), 1, {0, 2}),
}


def point(channels, size):
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(3, channels, size, size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([1e-3, 0.7, 41.0], dtype=torch.float64)


def check(unet, weights, expected, x, z):
    unet.double()
    shuffled = dict(sorted({f"module.{name}": tensor for name, tensor in weights.items()}.items()))
    unet.load_state_dict(convert_pfgm_unet(unet, shuffled | {"module.sigmas": torch.zeros(3)}))
    for ours, theirs in zip(outputs(unet, x, z), expected, strict=True):
        assert theirs.std() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", DDPMPP.values(), ids=DDPMPP)
@pytest.mark.parametrize("channels", [1, 3])
def test_ddpmpp(settings, channels):
    weights, (x, z) = Weights(), point(channels, 16)
    expected = ddpmpp(weights, x, z, *settings)
    check(ddpmpp_unet(channels, 16, *settings), weights, expected, x, z)


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformer_unet(settings):
    weights, (x, z) = Weights(), point(1, 16)
    expected = transformer_unet(weights, x, z, *settings)
    check(transformer(1, 16, *settings), weights, expected, x, z)


def test_weights_of_another_layout_are_refused():
    weights, (x, z) = Weights(), point(1, 16)
    ddpmpp(weights, x, z, *DDPMPP["deep"])
    with pytest.raises(ValueError, match=r"weights are of 3\d modules, the network has 2\d"):
        convert_pfgm_unet(ddpmpp_unet(1, 16, *DDPMPP["no attention"]), weights)
