"""What of the network is not in the equality with the published ones: see tests/conversion for that."""

import math

import pytest
import torch

from tonefield import SongUNet2DModel
from tonefield.pipelines.tonefield_mel_editing import circular_in_time


FORMS = ["ddpmpp", "ncsnpp"]


def small(form, **more):
    layout = dict(sample_size=[16, 16], model_channels=8, block_out_channels=[8, 16], layers_per_block=1)
    return SongUNet2DModel(form=form, **layout | more)


def randomise(unet, seed=0):
    """Weights among which none is almost 0, so that every part of the network matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet.eval()


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded(form, tmp_path, caplog):
    unet = randomise(small(form, num_class_embeds=3, dropout=0.1, augment_dim=2))
    assert {module.p for module in unet.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    unet.save_pretrained(tmp_path)
    loaded = SongUNet2DModel.from_pretrained(tmp_path)
    assert not caplog.records
    x, t, labels = torch.randn(3, 1, 16, 16), torch.tensor([-1.0, 0.2, 0.9]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        first, again = unet(x, t, labels).sample, loaded(x, t, class_labels=labels).sample
        alone = unet(x[:1], -1.0, labels[:1], return_dict=False)[0]
    assert torch.equal(first, again)
    torch.testing.assert_close(alone, first[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_keeps_the_phases(form, tmp_path):
    unet = randomise(small(form))
    exact = unet.frequencies.clone()
    unet.save_pretrained(tmp_path)
    for half in (unet.to(torch.bfloat16), SongUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)):
        assert half.conv_in.weight.dtype == torch.bfloat16
        assert torch.equal(half.frequencies, exact) and half.frequencies.dtype == torch.float32
        assert half(torch.randn(1, 1, 16, 16).bfloat16(), torch.tensor(0.5)).sample.dtype == torch.bfloat16
    assert unet.double().frequencies.dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
def test_a_loop_has_no_beginning(form):
    unet = randomise(small(form, block_out_channels=[8, 16, 16])).double()
    x, t = torch.randn(1, 1, 16, 16, dtype=torch.float64), torch.tensor(0.3)
    with torch.no_grad(), circular_in_time(unet):
        first, rolled = unet(x, t).sample, unet(x.roll(4, dims=3), t).sample
    torch.testing.assert_close(rolled, first.roll(4, dims=3))
    with torch.no_grad():
        assert (unet(x.roll(4, dims=3), t).sample - first.roll(4, dims=3)).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_nothing(form):
    unet = randomise(small(form, num_class_embeds=3)).train()
    x, t, labels = torch.randn(2, 1, 16, 16), torch.tensor([0.3, -0.3]), torch.tensor([0, 1])
    gradients = []
    for _ in range(2):
        unet.zero_grad()
        unet(x, t, labels).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
        unet.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("form", FORMS)
def test_weights_at_the_beginning(form):
    torch.manual_seed(0)
    unet = small(form, model_channels=64, block_out_channels=[64, 64], num_class_embeds=11, augment_dim=9)
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim > 1:
            receptive = parameter[0, 0].numel()
            fan_avg = receptive * (parameter.shape[0] + parameter.shape[1]) / 2
            gain = 1e-5 if any(part in name for part in ("conv2", "to_out", "conv_out")) else 1
            gain = math.sqrt(0.2) if "qkv" in name else gain
            # Four deviations of the variance of uniform draws.
            assert parameter.var().item() == pytest.approx(gain**2 / fan_avg, rel=4 * (0.8 / parameter.numel()) ** 0.5)
    x = torch.randn(2, 1, 16, 16)
    assert unet(x, torch.tensor(0.0)).sample.abs().max() < 1e-3
    if form == "ncsnpp":
        assert unet.frequencies.std().item() == pytest.approx(2 * math.pi * 16, rel=0.4)


def test_heights_and_widths_need_not_be_equal():
    for form in FORMS:
        unet = randomise(small(form, sample_size=[8, 24]))
        assert unet(torch.randn(2, 1, 8, 24), torch.tensor(0.1)).sample.shape == (2, 1, 8, 24)


def test_sizes_of_the_published_networks():
    """EDM's networks for CIFAR-10 and FFHQ have 55.7 and 61.8 million parameters (table 7)."""
    with torch.device("meta"):
        cifar = SongUNet2DModel(32, 3, 3, "ddpmpp", 128, (256, 256, 256), 4, (1,), augment_dim=9)
        ffhq = SongUNet2DModel(64, 3, 3, "ddpmpp", 128, (128, 256, 256, 256), 4, (2,), augment_dim=9)
    assert cifar.num_parameters() == pytest.approx(55.7e6, abs=0.1e6)
    assert ffhq.num_parameters() == pytest.approx(61.8e6, abs=0.1e6)


def test_what_is_refused():
    for message, arguments in {
        "`form` is 'adm': it must be ddpmpp or ncsnpp": dict(form="adm"),
        r"`attention_levels` is \[2\]: levels are 0 to 1": dict(form="ddpmpp", attention_levels=[2]),
        "18 channels do not make 4 groups: use multiples of 4": dict(form="ddpmpp", block_out_channels=[8, 10]),
        "2 channels do not make 0 groups": dict(form="ncsnpp", block_out_channels=[8, 2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            small(**arguments)
