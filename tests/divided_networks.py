"""A script that several processes run: they divide a network, train it for a step, and print what each one has."""

import argparse
import copy
import json

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.optimization import get_constant_schedule as constant_schedule
from torch.distributed.tensor import DTensor

from tonefield.models import SEDDTransformer1DModel
from tonefield.training.engines import FSDP, ZeRO, blocks_of, whole_of


def make_unet():
    return UNet2DModel(
        16, 1, 1, block_out_channels=(6, 14), norm_num_groups=2, layers_per_block=1, attention_head_dim=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ), (torch.randn(12, 1, 16, 16), torch.rand(12))  # fmt: skip


def make_text_unet():
    return UNet2DConditionModel(
        16, 1, 1, block_out_channels=(6, 14), norm_num_groups=2, layers_per_block=1, attention_head_dim=(2, 2),
        cross_attention_dim=5, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ), (torch.randn(12, 1, 16, 16), torch.rand(12), torch.randn(12, 3, 5))  # fmt: skip


def make_autoencoder():
    return AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (6, 14), norm_num_groups=2, latent_channels=3,
        mid_block_add_attention=False,
    ), (torch.randn(12, 1, 16, 16),)  # fmt: skip


def make_transformer():
    network = SEDDTransformer1DModel(7, "absorb", hidden_size=24, num_layers=2, num_heads=2, cond_dim=10, dropout=0.0)
    for value in network.parameters():  # some of which are 0 in a fresh one
        torch.nn.init.normal_(value, std=0.1)
    return network, (torch.randint(0, 8, (12, 9)), torch.rand(12))


NETWORKS = {"u-net": make_unet, "u-net told words": make_text_unet, "autoencoder": make_autoencoder,
            "transformer": make_transformer}  # fmt: skip


def parse_args(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--zero", type=int, help="the stage of ZeRO, in the place of FSDP")
    parser.add_argument("--keep", action="store_true", help="weights of blocks between the passes")
    return parser.parse_args(argv)


def size(values):
    return sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in values)


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def step(network, optimizer, batch):
    output = network(*batch).sample
    output.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return output.detach()


def optimize(network):
    # With its usual epsilon Adam makes a full step of the rounding of a gradient of 0.
    return torch.optim.AdamW(network.parameters(), 0.1, eps=0.01, fused=True)


def main(args):
    accelerator = Accelerator()
    torch.manual_seed(0)
    network, batch = NETWORKS[args.name]()
    if args.zero:
        zero(accelerator, network, batch, args.zero)
    else:
        fsdp(accelerator, network, batch, args)


def zero(accelerator, network, batch, stage):
    plain = copy.deepcopy(network)
    settings = {"train_micro_batch_size_per_gpu": 12 // accelerator.num_processes, "gradient_clipping": 1e9}
    engine = ZeRO(accelerator, network, stage, False, settings)
    optimizer = optimize(network)
    called, wrapped, _ = engine.prepare(optimizer, constant_schedule(optimizer))
    mine = [value.chunk(accelerator.num_processes)[accelerator.process_index] for value in batch]
    with engine.accumulate([called]):
        engine.backward(called(*mine).sample.square().mean())
        engine.update([called], wrapped, 1e9)
    step(plain, optimize(plain), batch)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    apart = max((value - network.state_dict()[name]).abs().max() for name, value in plain.state_dict().items())
    print(json.dumps({"whole": size(plain.parameters()), "moments": size(moments), "weights differ by": apart.item()}))


def fsdp(accelerator, network, batch, args):
    before = copy.deepcopy(network)
    engine = FSDP(accelerator, network, reshard=not args.keep)
    undivided = equal(engine.whole(network).state_dict(), before.state_dict())
    optimizer, one = optimize(network), optimize(plain := copy.deepcopy(before))
    engine.prepare(optimizer, constant_schedule(optimizer))

    rank, count = accelerator.process_index, accelerator.num_processes
    mine = [value.chunk(count)[rank] for value in batch]
    differs = (step(network, optimizer, mine) - step(plain, one, batch).chunk(count)[rank]).abs().max()
    after, expected = engine.whole(network).state_dict(), plain.state_dict()
    apart = max((after[name] - value).abs().max() for name, value in expected.items())
    moved = max((before.state_dict()[name] - value).abs().max() for name, value in expected.items())

    # A second step goes away from what was saved, which is then restored.
    saved = broadcast_object_list([optimizer.state_dict()])[0]
    network(*mine)
    blocks = [value for block in blocks_of(network) for value in block.parameters()]
    kept_whole = [not isinstance(value, DTensor) for value in blocks]
    step(network, optimizer, mine)
    gone = not equal(engine.whole(network).state_dict(), after)
    network.load_state_dict(engine.shares(network, after))
    optimizer.load_state_dict(copy.deepcopy(saved))
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    kept = [saved["state"][n][name] for n in saved["state"] for name in saved["state"][n] if name != "step"]
    print(json.dumps({
        "share": size(network.parameters()), "whole": size(before.parameters()), "moments": size(moments),
        "undivided is equal": undivided, "blocks kept": sum(kept_whole) / len(kept_whole),
        "restored is equal": gone and equal(engine.whole(network).state_dict(), after),
        "moments are restored": all(whole_of(now).equal(then) for now, then in zip(moments, kept, strict=True)),
        "output differs by": differs.item(), "weights differ by": apart.item(), "weights moved by": moved.item(),
    }))  # fmt: skip
