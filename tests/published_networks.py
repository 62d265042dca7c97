"""The published PFGM networks, written down from their description as plain functions of named tensors.

Nothing of diffusers or of this project is used. Layers take their tensors from `Weights`, which makes up what is first
asked for, so that the names and shapes of the published weights come from here as well.
"""

import itertools
import math

import torch
from torch.nn import functional as F


class Weights(dict):
    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name, *shape):
        if name not in self:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
            tensor = torch.randn(shape, generator=self.generator, dtype=torch.float64) / fan_in**0.5
            self[name] = tensor + (1 if "norm" in name.lower() and name.endswith("weight") else 0)
        return self[name]

    def conv(self, name, x, out, kernel=3, **options):
        weight = self(f"{name}.weight", out, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self(f"{name}.bias", out), **options)

    def linear(self, name, x, out, bias=True):
        weight = self(f"{name}.weight", out, x.shape[-1])
        return F.linear(x, weight, self(f"{name}.bias", out) if bias else None)

    def nin(self, name, x, out):
        """A 1x1 convolution whose matrix maps channels from the left."""
        matrix, bias = self(f"{name}.W", x.shape[1], out), self(f"{name}.b", out)
        return torch.einsum("bihw,io->bohw", x, matrix) + bias[:, None, None]

    def norm(self, name, x, groups, eps):
        weight, bias = self(f"{name}.weight", x.shape[1]), self(f"{name}.bias", x.shape[1])
        grouped = x.unflatten(1, (groups, -1))
        mean, variance = grouped.mean((2, 3, 4), keepdim=True), grouped.var((2, 3, 4), correction=0, keepdim=True)
        return ((grouped - mean) / (variance + eps).sqrt()).flatten(1, 2) * weight[:, None, None] + bias[:, None, None]


def sinusoids(z, dim):
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1))
    angles = z[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def halve(x):
    return F.avg_pool2d(x, 2)


def double(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def ddpmpp(w, x, z, nf, multipliers, blocks, attention, biggan, centered=False):
    """DDPM++ as PFGM has it, with attention at the given levels; returns both parts of the field."""
    numbers = itertools.count()
    channels = x.shape[1]

    def name():
        return f"all_modules.{next(numbers)}"

    def norm(layer, h):
        return w.norm(layer, h, min(h.shape[1] // 4, 32), 1e-6)

    embedding = w.linear(name(), sinusoids(z, nf), 4 * nf)
    embedding = F.silu(w.linear(name(), F.silu(embedding), 4 * nf))

    def block(h, out, resample=None):
        layer, skip = name(), h
        h = F.silu(norm(f"{layer}.GroupNorm_0", h))
        if resample is not None:
            h, skip = resample(h), resample(skip)
        h = (
            w.conv(f"{layer}.Conv_0", h, out, padding=1)
            + w.linear(f"{layer}.Dense_0", embedding, out)[..., None, None]
        )
        h = w.conv(f"{layer}.Conv_1", F.silu(norm(f"{layer}.GroupNorm_1", h)), out, padding=1)
        if skip.shape[1] != out or resample is not None:
            skip = w.conv(f"{layer}.Conv_2", skip, out, 1) if biggan else w.nin(f"{layer}.NIN_0", skip, out)
        return (skip + h) / math.sqrt(2)

    def attend(h):
        layer, size = name(), h.shape[1]
        inner = norm(f"{layer}.GroupNorm_0", h)
        q, k, v = (w.nin(f"{layer}.NIN_{i}", inner, size).flatten(2) for i in range(3))
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(size)).softmax(dim=2)
        inner = torch.einsum("bij,bcj->bci", weights, v).unflatten(2, h.shape[2:])
        return (h + w.nin(f"{layer}.NIN_3", inner, size)) / math.sqrt(2)

    h = w.conv(name(), x if centered else 2 * x - 1, nf, padding=1)
    passed = [h]
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            h = block(h, nf * multiplier)
            if level in attention:
                h = attend(h)
            passed.append(h)
        if level < len(multipliers) - 1:
            if biggan:
                h = block(h, h.shape[1], halve)
            else:
                h = w.conv(f"{name()}.conv", F.pad(h, (0, 1, 0, 1)), h.shape[1], stride=2)
            passed.append(h)
    h = block(h, h.shape[1])
    h = attend(h)
    h = block(h, h.shape[1])
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for _ in range(blocks + 1):
            h = block(torch.cat([h, passed.pop()], 1), nf * multiplier)
        if level in attention:
            h = attend(h)
        if level > 0:
            h = block(h, h.shape[1], double) if biggan else w.conv(f"{name()}.conv", double(h), h.shape[1], padding=1)
    assert not passed
    h = F.silu(norm(name(), h))
    h = w.conv(name(), h, channels + 1, padding=1)
    return h[:, :channels], h[:, channels].mean((1, 2))


def transformer_unet(w, x, z, nf, multipliers, blocks, attention):
    """The U-Net with transformer blocks; each channel is an attention head of its own."""
    channels = x.shape[1]

    def norm(layer, h, eps=1e-5):
        return w.norm(layer, h, 32, eps)

    embedding = w.linear("time_embed.0", sinusoids(z, nf), 4 * nf)
    embedding = F.silu(w.linear("time_embed.2", F.silu(embedding), 4 * nf))

    def block(layer, h, out):
        skip = h
        h = w.conv(f"{layer}.in_layers.2", F.silu(norm(f"{layer}.in_layers.0", h)), out, padding=1)
        h = h + w.linear(f"{layer}.emb_layers.1", embedding, out)[..., None, None]
        h = w.conv(f"{layer}.out_layers.3", F.silu(norm(f"{layer}.out_layers.0", h)), out, padding=1)
        return h + (skip if skip.shape[1] == out else w.conv(f"{layer}.skip_connection", skip, out, 1))

    def attend(layer, tokens):
        size = tokens.shape[2]
        q, k, v = (w.linear(f"{layer}.to_{kind}", tokens, size, bias=False) for kind in "qkv")
        weights = torch.einsum("bic,bjc->bcij", q, k).softmax(dim=3)
        return w.linear(f"{layer}.to_out.0", torch.einsum("bcij,bjc->bic", weights, v), size)

    def layer_norm(layer, tokens):
        size = tokens.shape[2]
        return F.layer_norm(tokens, (size,), w(f"{layer}.weight", size), w(f"{layer}.bias", size), 1e-5)

    def transformer(layer, h):
        size = h.shape[1]
        inner = w.conv(f"{layer}.proj_in", norm(f"{layer}.norm", h, 1e-6), size, 1)
        tokens, path = inner.flatten(2).mT, f"{layer}.transformer_blocks.0"
        tokens = tokens + attend(f"{path}.attn1", layer_norm(f"{path}.norm1", tokens))
        tokens = tokens + attend(f"{path}.attn2", layer_norm(f"{path}.norm2", tokens))
        value, gate = w.linear(f"{path}.ff.net.0.proj", layer_norm(f"{path}.norm3", tokens), 8 * size).chunk(2, dim=2)
        tokens = tokens + w.linear(f"{path}.ff.net.2", value * F.gelu(gate), size)
        return h + w.conv(f"{layer}.proj_out", tokens.mT.unflatten(2, h.shape[2:]), size, 1)

    h = w.conv("input_blocks.0.0", x, nf, padding=1)
    passed, numbers = [h], itertools.count(1)
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            layer = f"input_blocks.{next(numbers)}"
            h = block(f"{layer}.0", h, nf * multiplier)
            if level in attention:
                h = transformer(f"{layer}.1", h)
            passed.append(h)
        if level < len(multipliers) - 1:
            h = w.conv(f"input_blocks.{next(numbers)}.0.op", h, h.shape[1], stride=2, padding=1)
            passed.append(h)
    h = block("middle_block.0", h, h.shape[1])
    h = transformer("middle_block.1", h)
    h = block("middle_block.2", h, h.shape[1])
    numbers = itertools.count()
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for i in range(blocks + 1):
            layer = f"output_blocks.{next(numbers)}"
            h = block(f"{layer}.0", torch.cat([h, passed.pop()], 1), nf * multiplier)
            if level in attention:
                h = transformer(f"{layer}.1", h)
            if level > 0 and i == blocks:
                h = w.conv(f"{layer}.{1 + (level in attention)}.conv", double(h), h.shape[1], padding=1)
    assert not passed
    h = w.conv("out.2", F.silu(norm("out.0", h)), channels + 1, padding=1)
    return h[:, :channels], h[:, channels].mean((1, 2))


def filtered(x, taps, up, pad):
    """Zeros between the values (`up`), zeros around them, and a filter along both axes that sums to `up` each."""
    stuffed = x.new_zeros(*x.shape[:2], up * x.shape[2], up * x.shape[3])
    stuffed[..., ::up, ::up] = x
    taps = torch.tensor(taps, dtype=x.dtype) * up / sum(taps)
    for dim in (2, 3):
        padded = F.pad(stuffed.movedim(dim, -1), pad)
        width = padded.shape[-1] - len(taps) + 1
        stuffed = sum(tap * padded[..., i : i + width] for i, tap in enumerate(taps)).movedim(-1, dim)
    return stuffed


def song_unet(w, x, noise, form, nf, multipliers, blocks, attention, out, classes=None, augmentation=None):
    """EDM's SongUNet as DDPM++ or NCSN++; `noise` is ln(sigma) / 4, the classes and augmentations are vectors."""
    smooth = form == "ncsnpp"
    taps = [1, 3, 3, 1] if smooth else [1, 1]
    size, width = x.shape[-1], nf * (2 if smooth else 1)

    def smaller(h):
        return filtered(h, taps, 1, (1, 1) if smooth else (0, 0))[..., ::2, ::2]

    def larger(h):
        return filtered(h, taps, 2, (2, 1) if smooth else (1, 0))

    def norm(layer, h):
        return w.norm(layer, h, min(h.shape[1] // 4, 32), 1e-6)

    if smooth:
        angles = noise[:, None] * (2 * math.pi * w("map_noise.freqs", width // 2))
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    else:
        embedding = sinusoids(noise, width)
    if classes is not None:
        embedding = embedding + w.linear("map_label", classes * math.sqrt(classes.shape[1]), width)
    if augmentation is not None:
        embedding = embedding + w.linear("map_augment", augmentation, width, bias=False)
    embedding = F.silu(w.linear("map_layer0", embedding, 4 * nf))
    embedding = F.silu(w.linear("map_layer1", embedding, 4 * nf))

    def block(layer, h, out, attend=False, resample=None):
        skip = h
        h = F.silu(norm(f"{layer}.norm0", h))
        if resample is not None:
            h, skip = resample(h), resample(skip)
            w[f"{layer}.conv0.resample_filter"] = w[f"{layer}.skip.resample_filter"] = table
        h = w.conv(f"{layer}.conv0", h, out, padding=1) + w.linear(f"{layer}.affine", embedding, out)[..., None, None]
        h = w.conv(f"{layer}.conv1", F.silu(norm(f"{layer}.norm1", h)), out, padding=1)
        if skip.shape[1] != out or resample is not None:
            skip = w.conv(f"{layer}.skip", skip, out, 1)
        h = (skip + h) / math.sqrt(2)
        if attend:
            qkv = w.conv(f"{layer}.qkv", norm(f"{layer}.norm2", h), 3 * out, 1).flatten(2)
            q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
            weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(out)).softmax(dim=2)
            seen = torch.einsum("bij,bcj->bci", weights, v).unflatten(2, h.shape[2:])
            h = (h + w.conv(f"{layer}.proj", seen, out, 1)) / math.sqrt(2)
        return h

    table = torch.tensor(taps, dtype=torch.float64).outer(torch.tensor(taps, dtype=torch.float64))[None, None]
    table = table / table.sum()
    at = [f"{size >> level}x{size >> level}" for level in range(len(multipliers))]
    h = w.conv(f"enc.{at[0]}_conv", x, nf, padding=1)
    passed, seen = [h], x
    for level, multiplier in enumerate(multipliers):
        if level > 0:
            h = block(f"enc.{at[level]}_down", h, h.shape[1], resample=smaller)
            if smooth:
                name = f"enc.{at[level]}_aux_residual"
                w[f"{name}.resample_filter"] = table
                # Smoothed first and the convolution sparse: the order does not matter inside of enough zeros.
                wide = filtered(F.pad(seen, (2, 2, 2, 2)), taps, 1, (0, 0))
                h = seen = (h + w.conv(name, wide, h.shape[1], stride=2)) / math.sqrt(2)
            passed.append(h)
        for i in range(blocks):
            h = block(f"enc.{at[level]}_block{i}", h, nf * multiplier, level in attention)
            passed.append(h)
    h = block(f"dec.{at[-1]}_in0", h, h.shape[1], True)
    h = block(f"dec.{at[-1]}_in1", h, h.shape[1])
    for level, multiplier in reversed(list(enumerate(multipliers))):
        if level < len(multipliers) - 1:
            h = block(f"dec.{at[level]}_up", h, h.shape[1], resample=larger)
        for i in range(blocks + 1):
            attend = level in attention and i == blocks
            h = block(f"dec.{at[level]}_block{i}", torch.cat([h, passed.pop()], 1), nf * multiplier, attend)
    assert not passed
    h = F.silu(norm(f"dec.{at[0]}_aux_norm", h))
    return w.conv(f"dec.{at[0]}_aux_conv", h, out, padding=1)


def ncsnpp(w, x, z, nf, multipliers, blocks, attention):
    """NCSN++ as PFGM has it for CIFAR-10: told ln(z), with a smooth filter and the input added at each level."""
    numbers, channels = itertools.count(), x.shape[1]
    taps = [1, 3, 3, 1]

    def name():
        return f"all_modules.{next(numbers)}"

    def norm(layer, h):
        return w.norm(layer, h, min(h.shape[1] // 4, 32), 1e-6)

    def smaller(h):
        return filtered(h, taps, 1, (1, 1))[..., ::2, ::2]

    def larger(h):
        return filtered(h, taps, 2, (2, 1))

    angles = z.log()[:, None] * (2 * math.pi * w(f"{name()}.W", nf))
    embedding = w.linear(name(), torch.cat([angles.sin(), angles.cos()], dim=1), 4 * nf)
    embedding = F.silu(w.linear(name(), F.silu(embedding), 4 * nf))

    def block(h, out, resample=None):
        layer, skip = name(), h
        h = F.silu(norm(f"{layer}.GroupNorm_0", h))
        if resample is not None:
            h, skip = resample(h), resample(skip)
        told = w.linear(f"{layer}.Dense_0", embedding, out)[..., None, None]
        h = w.conv(f"{layer}.Conv_0", h, out, padding=1) + told
        h = w.conv(f"{layer}.Conv_1", F.silu(norm(f"{layer}.GroupNorm_1", h)), out, padding=1)
        if skip.shape[1] != out or resample is not None:
            skip = w.conv(f"{layer}.Conv_2", skip, out, 1)
        return (skip + h) / math.sqrt(2)

    def attend(h):
        layer, size = name(), h.shape[1]
        inner = norm(f"{layer}.GroupNorm_0", h)
        q, k, v = (w.nin(f"{layer}.NIN_{i}", inner, size).flatten(2) for i in range(3))
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(size)).softmax(dim=2)
        inner = torch.einsum("bij,bcj->bci", weights, v).unflatten(2, h.shape[2:])
        return (h + w.nin(f"{layer}.NIN_3", inner, size)) / math.sqrt(2)

    h, seen = w.conv(name(), x, nf, padding=1), x
    passed = [h]
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            h = block(h, nf * multiplier)
            if level in attention:
                h = attend(h)
            passed.append(h)
        if level < len(multipliers) - 1:
            h = block(h, h.shape[1], smaller)
            wide = filtered(F.pad(seen, (2, 2, 2, 2)), taps, 1, (0, 0))
            h = seen = (w.conv(f"{name()}.Conv2d_0", wide, h.shape[1], stride=2) + h) / math.sqrt(2)
            passed.append(h)
    h = block(attend(block(h, h.shape[1])), h.shape[1])
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for _ in range(blocks + 1):
            h = block(torch.cat([h, passed.pop()], 1), nf * multiplier)
        if level in attention:
            h = attend(h)
        if level > 0:
            h = block(h, h.shape[1], larger)
    assert not passed
    h = F.silu(norm(name(), h))
    h = w.conv(name(), h, channels + 1, padding=1)
    return h[:, :channels], h[:, channels].mean((1, 2))
