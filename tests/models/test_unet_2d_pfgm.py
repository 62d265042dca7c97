"""What of the PFGM networks is not in the equality with the published ones: see tests/conversion for that."""

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from tonefield import PFGMTransformerUNet2DModel, PFGMUNet2DModel
from tonefield.pipelines.tonefield_mel_editing import circular_in_time


def small(kind, width=8, **more):
    arguments = dict(sample_size=[16, 16], in_channels=1, out_channels=2, layers_per_block=1) | more
    if kind == "transformer":
        return PFGMTransformerUNet2DModel(
            block_out_channels=[32, 64], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], **arguments,
        )  # fmt: skip
    resample, top = ("resnet", "ResnetUpsampleBlock2D") if kind == "biggan" else ("conv", "UpBlock2D")
    return PFGMUNet2DModel(
        block_out_channels=[width, 2 * width], down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", top],
        downsample_type=resample, upsample_type=resample, **arguments,
    )  # fmt: skip


def randomise(unet, seed=0):
    """Weights among which none is almost 0, so that every part of the network matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet.eval()


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


KINDS = ["plain", "biggan", "transformer"]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path, caplog):
    more = dict(norm_num_groups=8, time_embedding_dim=64) if kind == "transformer" else dict(norm_num_groups=2)
    unet = randomise(small(kind, num_class_embeds=3, dropout=0.1, **more))
    assert {block.dropout.p for block in unet.modules() if isinstance(block, ResnetBlock2D)} == {0.1}
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    assert not caplog.records
    assert public(loaded.config) == public(unet.config)
    x, t, labels = torch.randn(3, 1, 16, 16), torch.tensor([-1.0, 0.2, 0.9]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        first, again = unet(x, t, class_labels=labels).sample, loaded(x, t, class_labels=labels).sample
        other = unet(x, t, class_labels=labels.flip(0), return_dict=False)[0]
    assert torch.equal(first, again)
    assert torch.equal(first[1], other[1]) and not torch.allclose(first[0], other[0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_has_no_beginning(kind):
    unet = randomise(small(kind)).double()
    x, t = torch.randn(1, 1, 16, 16, dtype=torch.float64), torch.tensor(0.3)
    with torch.no_grad(), circular_in_time(unet):
        first, rolled = unet(x, t).sample, unet(x.roll(4, dims=3), t).sample
    torch.testing.assert_close(rolled, first.roll(4, dims=3))
    with torch.no_grad():
        assert (unet(x.roll(4, dims=3), t).sample - first.roll(4, dims=3)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    unet = randomise(small(kind)).train()
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([0.3, -0.3])
    gradients = []
    for _ in range(2):
        unet.zero_grad()
        unet(x, t).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
        unet.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_weights_at_the_beginning():
    unet = small("biggan", width=64)
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim > 1:
            receptive = parameter[0, 0].numel()
            fan_avg = receptive * (parameter.shape[0] + parameter.shape[1]) / 2
            almost_zero = any(part in name for part in ("conv2", "to_out", "conv_out"))
            variance = (1e-10 if almost_zero else 1) / fan_avg
            # Four deviations of the variance of uniform draws.
            assert parameter.var().item() == pytest.approx(variance, rel=4 * (0.8 / parameter.numel()) ** 0.5)
    x = torch.randn(2, 1, 16, 16)
    block = unet.down_blocks[0].resnets[0]
    h = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(block(h, torch.randn(2, 256)), h / 2**0.5, rtol=1e-3, atol=1e-3)
    assert unet(x, torch.tensor(0.0)).sample.abs().max() < 1e-3


def test_what_it_takes_from_unet_2d_model():
    """Without resampling, attention and sinusoids, it is diffusers' network with another scale of the residuals."""
    layout = dict(
        in_channels=1, out_channels=2, block_out_channels=[16], layers_per_block=1, down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"], add_attention=False, norm_eps=1e-6, norm_num_groups=4, freq_shift=1,
        flip_sin_to_cos=False,
    )  # fmt: skip
    ours, theirs = randomise(PFGMUNet2DModel(**layout)), UNet2DModel(**layout).eval()
    theirs.load_state_dict(ours.state_dict())
    for module in theirs.modules():
        if isinstance(module, ResnetBlock2D):
            module.output_scale_factor = 2**0.5
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 30.0])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, sigma.log() / 4).sample, theirs(x, sigma).sample)
