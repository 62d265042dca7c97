"""The best network so far, on disk."""

import math

import pytest
import torch
from diffusers import UNet2DModel

from tonefield.training.checkpoints import Best


CONFIG = dict(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, attention_head_dim=4,
              down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), sample_size=4)  # fmt: skip


@pytest.fixture
def network():
    return UNet2DModel(**CONFIG)


def mark(network, value):
    with torch.no_grad():
        network.conv_out.bias.fill_(value)
    return network


def kept(best, network):
    best.restore(mark(network, -1.0))
    return network.conv_out.bias[0].item()


def test_the_lowest_loss_of_the_last_stage_is_kept(network, tmp_path):
    best = Best(tmp_path, "unet", anew=True)
    assert kept(best, network) == -1  # nothing there yet
    for value, loss, stage, expected in [
        (1, math.nan, 0, -1), (2, 5.0, 0, 2), (3, 6.0, 0, 2), (4, 5.0, 0, 2), (5, 4.0, 0, 5), (6, 9.0, 1, 6),
        (7, 3.0, 0, 6), (8, math.inf, 1, 6), (9, 8.0, 1, 9),
    ]:  # fmt: skip
        best.offer(mark(network, float(value)), loss, step=value, stage=stage)
        assert kept(best, network) == expected, value
    assert {path.name for path in tmp_path.iterdir()} == {"best"}


def test_a_run_that_goes_on_remembers_and_a_new_one_forgets(network, tmp_path):
    Best(tmp_path, "unet", anew=True).offer(mark(network, 1.0), 5.0, step=1)
    again = Best(tmp_path, "unet", anew=False)
    again.offer(mark(network, 2.0), 6.0, step=2)
    assert kept(again, network) == 1
    new = Best(tmp_path, "unet", anew=True)
    assert kept(new, network) == -1
    new.offer(mark(network, 3.0), 7.0, step=1)
    assert kept(new, network) == 3
