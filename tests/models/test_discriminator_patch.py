"""What a patch discriminator sees, and that it judges each sample by itself."""

import pytest
import torch

from tonefield.models import PatchDiscriminator


def discriminator(**config):
    torch.manual_seed(0)
    return PatchDiscriminator(base_channels=8, **config).double()


@pytest.mark.parametrize(("layers", "patch"), [(1, 12), (2, 26), (3, 54)])
def test_an_output_sees_a_patch(layers, patch):
    """Which inputs move the middle output, with the normalisation, which sees everything, taken out."""
    network = discriminator(num_layers=layers)
    for index, layer in enumerate(network.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            network.layers[index] = torch.nn.Identity()
    sample = torch.randn(1, 1, 128, 128, dtype=torch.float64, requires_grad=True)
    output = network(sample)
    assert output.shape == (1, 1, 128 // 2**layers, 128 // 2**layers)
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    rows, columns = (sample.grad[0, 0].abs().sum(axis) > 0 for axis in (1, 0))
    assert (rows.sum(), columns.sum()) == (patch, patch)


def test_a_sample_is_judged_by_itself():
    network = discriminator(in_channels=2)
    samples = torch.randn(3, 2, 32, 64, dtype=torch.float64)
    together = network(samples)
    assert together.shape == (3, 1, 4, 8)
    torch.testing.assert_close(together[1:2], network(samples[1:2]), rtol=1e-12, atol=1e-12)


def test_it_is_saved_and_loaded(tmp_path):
    network = discriminator(num_layers=2).float()
    network.save_pretrained(tmp_path)
    again = PatchDiscriminator.from_pretrained(tmp_path)
    samples = torch.randn(1, 1, 16, 16)
    assert torch.equal(network(samples), again(samples))
