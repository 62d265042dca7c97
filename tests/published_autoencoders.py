"""The autoencoder of latent-diffusion, written down from its description as a plain function of named tensors.

Nothing of diffusers or of this project is used.
"""

import torch
from published_networks import Weights
from torch.nn import functional as F


def norm(w, name, x):
    return w.norm(name, x, 32, 1e-6)


def swish(x):
    return x * torch.sigmoid(x)


def resnet(w, name, x, width):
    y = w.conv(f"{name}.conv1", swish(norm(w, f"{name}.norm1", x)), width, padding=1)
    y = w.conv(f"{name}.conv2", swish(norm(w, f"{name}.norm2", y)), width, padding=1)
    return y + (x if x.shape[1] == width else w.conv(f"{name}.nin_shortcut", x, width, 1))


def attention(w, name, x):
    """One head over all places, of 1x1 convolutions."""
    width, y = x.shape[1], norm(w, f"{name}.norm", x)
    q, k, v = (w.conv(f"{name}.{part}", y, width, 1).flatten(2) for part in "qkv")
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / width**0.5, dim=2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    return x + w.conv(f"{name}.proj_out", mixed, width, 1)


def middle(w, name, x):
    x = resnet(w, f"{name}.mid.block_1", x, x.shape[1])
    x = attention(w, f"{name}.mid.attn_1", x)
    return resnet(w, f"{name}.mid.block_2", x, x.shape[1])


def encode(w, x, ch, multipliers, blocks, attended, latents):
    """Mean and log-variance, one after the other."""
    x = w.conv("encoder.conv_in", x, ch, padding=1)
    for level, multiplier in enumerate(multipliers):
        for block in range(blocks):
            x = resnet(w, f"encoder.down.{level}.block.{block}", x, ch * multiplier)
            if level in attended:
                x = attention(w, f"encoder.down.{level}.attn.{block}", x)
        if level < len(multipliers) - 1:
            x = w.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), x.shape[1], stride=2)
    x = swish(norm(w, "encoder.norm_out", middle(w, "encoder", x)))
    return w.conv("quant_conv", w.conv("encoder.conv_out", x, 2 * latents, padding=1), 2 * latents, 1)


def decode(w, z, ch, multipliers, blocks, attended, channels):
    x = w.conv("post_quant_conv", z, z.shape[1], 1)
    x = middle(w, "decoder", w.conv("decoder.conv_in", x, ch * multipliers[-1], padding=1))
    for level in reversed(range(len(multipliers))):
        for block in range(blocks + 1):
            x = resnet(w, f"decoder.up.{level}.block.{block}", x, ch * multipliers[level])
            if level in attended:
                x = attention(w, f"decoder.up.{level}.attn.{block}", x)
        if level > 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = w.conv(f"decoder.up.{level}.upsample.conv", x, x.shape[1], padding=1)
    return w.conv("decoder.conv_out", swish(norm(w, "decoder.norm_out", x)), channels, padding=1)


def ldm_autoencoder(ch=32, multipliers=(1, 2, 2), blocks=1, attended=(), latents=2, channels=1, size=(8, 16), seed=0):
    """Random weights, pictures, and what encoder and decoder make of them."""
    w = Weights(seed)
    pictures = torch.randn(2, channels, *size, generator=w.generator, dtype=torch.float64)
    moments = encode(w, pictures, ch, multipliers, blocks, attended, latents)
    decoded = decode(w, moments[:, :latents], ch, multipliers, blocks, attended, channels)
    return dict(w), pictures, moments, decoded
