"""The U-Nets that PFGM++ and EDM diffusion were published with: DDPM++ and NCSN++ as EDM has them.

Papers: score SDEs https://huggingface.co/papers/2011.13456 (appendix H), EDM https://huggingface.co/papers/2206.00364
(appendix F.1), PFGM++ https://huggingface.co/papers/2302.04265.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)

FOURIER_SCALE = 16.0  # deviation of NCSN++'s random frequencies


@dataclass
class SongUNet2DOutput(BaseOutput):
    """
    Output of [`SongUNet2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, out_channels, height, width)`): What the network makes of x.
    """

    sample: torch.Tensor


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least 4 channels, at most 32 of them."""
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(f"{channels} channels do not make {groups} groups: use multiples of 4, above 128 of 32.")
    return nn.GroupNorm(groups, channels, eps=1e-6)


def begin(layer: Layer, gain: float = 1.0) -> Layer:
    """Weights with variance gain^2 / fan_avg, biases 0; a layer that ends a residual begins at almost 0."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class FixedConv2d(nn.Conv2d):
    """A filter that is not learnt, the same for each channel: (batch, C, h, w) -> (batch, C, maps, h', w')."""

    def __init__(self, weight: torch.Tensor, **options):
        super().__init__(1, len(weight), weight.shape[-1], bias=False, **options)
        del self.weight
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2])


def outer(rows: list[list[float]]) -> torch.Tensor:
    """Filters along one axis, made filters along two: every row with every row."""
    rows_ = torch.tensor(rows)
    return torch.einsum("ah,bw->abhw", rows_, rows_).flatten(0, 1)[:, None]


class Halve(nn.Module):
    """Half the height and width: the mean of 2 x 2, or smoother, with (1, 3, 3, 1) / 8 along both axes."""

    def __init__(self, smooth: bool, padding: int = 1):
        super().__init__()
        low_pass = [[1 / 8, 3 / 8, 3 / 8, 1 / 8]]
        self.filter = FixedConv2d(outer(low_pass), stride=2, padding=padding) if smooth else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 2) if self.filter is None else self.filter(x)[:, :, 0]


class Double(nn.Module):
    """Twice the height and width: each value 2 x 2 times, or the transpose of the smoother filter, times 4."""

    def __init__(self, smooth: bool):
        super().__init__()
        # What the filter makes of three neighbours at the left half and at the right half of the one in the middle.
        halves = [[1 / 4, 3 / 4, 0], [0, 3 / 4, 1 / 4]]
        self.filter = FixedConv2d(outer(halves), padding=1) if smooth else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.filter is None:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.pixel_shuffle(self.filter(x).flatten(1, 2), 2)


class SongUNetBlock(nn.Module):
    """A residual block that may double or halve its input, told the noise level; then, if wanted, attention."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_dim: int,
        dropout: float,
        attention: bool = False,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.norm1 = group_norm(channels)
        self.conv1 = begin(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1))
        self.embedding = begin(nn.Linear(embedding_dim, out_channels))
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = begin(nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1), gain=1e-5)
        self.shortcut = None
        if resample is not None or channels != out_channels:
            self.shortcut = begin(nn.Conv2d(channels, out_channels, kernel_size=1))
        self.attention = SongUNetAttention(out_channels) if attention else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h) + self.embedding(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        x = (h + (x if self.shortcut is None else self.shortcut(x))) * math.sqrt(0.5)
        return x if self.attention is None else self.attention(x)


class SongUNetAttention(nn.Module):
    """Self-attention of all positions with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.to_qkv = begin(nn.Conv2d(channels, 3 * channels, kernel_size=1), gain=math.sqrt(0.2))
        self.to_out = begin(nn.Conv2d(channels, channels, kernel_size=1), gain=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Query, key and value of a channel lie side by side: (batch, channels, 3, positions).
        qkv = self.to_qkv(self.norm(x)).flatten(2).unflatten(1, (-1, 3))
        query, key, value = qkv.permute(2, 0, 3, 1)[:, :, None]
        seen = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return (x + self.to_out(seen.mT.unflatten(2, x.shape[2:]))) * math.sqrt(0.5)


class SongUNet2DModel(ModelMixin, ConfigMixin):
    r"""
    The U-Net of EDM and PFGM++ (there named after Yang Song), weight for weight, in the two forms in which it exists.

    A class is a vector with one element for each class, and the null class is the vector of zeros: the last of
    `num_class_embeds` classes, which is also meant where no class is given.

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 64): Height and width of the samples.
        in_channels, out_channels (`int`, *optional*, defaults to 1): Channels of input and output.
        form (`"ddpmpp"` or `"ncsnpp"`, *optional*, defaults to `"ddpmpp"`):
            DDPM++ knows the noise level by sinusoids and resamples with boxes. NCSN++ knows it by random Fourier
            features, resamples with a smoother filter and adds the input, smaller and smaller, to each level.
        model_channels (`int`, *optional*, defaults to 128):
            Channels of the first convolution; the embedding of the noise level is four times as wide.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(256, 256, 256)`): Channels of each level.
        layers_per_block (`int`, *optional*, defaults to 4): Residual blocks of a level; one more on the way up.
        attention_levels (`tuple[int]`, *optional*, defaults to `(1,)`):
            Levels whose blocks are followed by attention: all of them on the way down, the last on the way up.
        dropout (`float`, *optional*, defaults to 0.0): Dropout inside of the residual blocks.
        num_class_embeds (`int`, *optional*): Number of classes with the null class; `None` for no classes.
        augment_dim (`int`, *optional*, defaults to 0):
            Size of the vectors that tell how a training sample was augmented; zeros tell that it was not.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SongUNetBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["frequencies"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 1,
        out_channels: int = 1,
        form: Literal["ddpmpp", "ncsnpp"] = "ddpmpp",
        model_channels: int = 128,
        block_out_channels: tuple[int, ...] = (256, 256, 256),
        layers_per_block: int = 4,
        attention_levels: tuple[int, ...] = (1,),
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        augment_dim: int = 0,
    ):
        super().__init__()
        if form not in ("ddpmpp", "ncsnpp"):
            raise ValueError(f"`form` is {form!r}: it must be ddpmpp or ncsnpp.")
        levels = range(len(block_out_channels))
        if not set(attention_levels) <= set(levels):
            raise ValueError(f"`attention_levels` is {list(attention_levels)}: levels are 0 to {len(levels) - 1}.")
        smooth = form == "ncsnpp"
        features, width = model_channels * (2 if smooth else 1), model_channels * 4
        frequencies = 10000 ** -torch.linspace(0, 1, features // 2, dtype=torch.float32)
        if smooth:
            frequencies = torch.randn(features // 2) * (2 * math.pi * FOURIER_SCALE)
        self.register_buffer("frequencies", frequencies, persistent=smooth)  # those of sinusoids are known
        self.class_embedding = begin(nn.Linear(num_class_embeds - 1, features)) if num_class_embeds else None
        self.augment_embedding = begin(nn.Linear(augment_dim, features, bias=False)) if augment_dim else None
        self.embedding_1 = begin(nn.Linear(features, width))
        self.embedding_2 = begin(nn.Linear(width, width))

        def block(inside: int, out: int, attention: bool = False, resample: nn.Module | None = None) -> SongUNetBlock:
            return SongUNetBlock(inside, out, width, dropout, attention, resample)

        # The blocks in the order in which they run; those that change the size stand between the levels.
        self.conv_in = begin(nn.Conv2d(in_channels, model_channels, kernel_size=3, padding=1))
        self.down_blocks, self.pyramid = nn.ModuleList(), nn.ModuleList()
        passed, seen, channels = [model_channels], in_channels, model_channels
        for level in levels:
            if level > 0:
                self.down_blocks.append(block(channels, channels, resample=Halve(smooth)))
                if smooth:
                    convolution = begin(nn.Conv2d(seen, channels, kernel_size=3, padding=2))
                    self.pyramid.append(nn.Sequential(convolution, Halve(smooth, padding=0)))
                    seen = channels
                passed.append(channels)
            for _ in range(layers_per_block):
                inside, channels = channels, block_out_channels[level]
                self.down_blocks.append(block(inside, channels, level in attention_levels))
                passed.append(channels)
        self.mid_blocks = nn.ModuleList([block(channels, channels, True), block(channels, channels)])
        self.up_blocks = nn.ModuleList()
        for level in reversed(levels):
            if level < levels[-1]:
                self.up_blocks.append(block(channels, channels, resample=Double(smooth)))
            for i in range(layers_per_block + 1):
                inside, channels = channels + passed.pop(), block_out_channels[level]
                attention = level in attention_levels and i == layers_per_block
                self.up_blocks.append(block(inside, channels, attention))
        self.norm_out = group_norm(channels)
        self.conv_out = begin(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1), gain=1e-5)
        self.gradient_checkpointing = False

    def _apply(self, fn, recurse=True):
        exact = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype in (torch.float16, torch.bfloat16):  # too coarse for the phase of a sinusoid
            self.frequencies = exact.to(self.frequencies.device, torch.float32)
        return self

    def _embed(
        self,
        batch_size: int,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        timestep = torch.as_tensor(timestep, device=self.frequencies.device).to(self.frequencies.dtype).reshape(-1, 1)
        angles = timestep.expand(batch_size, 1) * self.frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.dtype)
        if self.class_embedding is not None:
            count = self.class_embedding.in_features
            if class_labels is None:
                class_labels = embedding.new_zeros(batch_size, count)
            elif class_labels.ndim < 2:
                class_labels = F.one_hot(class_labels.reshape(-1), count + 1)[:, :-1]
            embedding = embedding + self.class_embedding(class_labels.to(self.dtype) * math.sqrt(count))
        if self.augment_embedding is not None and augment_labels is not None:
            embedding = embedding + self.augment_embedding(augment_labels.to(self.dtype))
        return F.silu(self.embedding_2(F.silu(self.embedding_1(embedding))))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SongUNet2DOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The noisy samples.
            timestep (`torch.Tensor` or `float`): c_noise = ln(sigma) / 4, one for all or one per sample.
            class_labels (`torch.Tensor`, *optional*):
                Classes by number, of shape `(batch_size,)`, or as vectors, `(batch_size, num_class_embeds - 1)`.
            augment_labels (`torch.Tensor` of shape `(batch_size, augment_dim)`, *optional*): The augmentations.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`SongUNet2DOutput`].
        """
        embedding = self._embed(len(sample), timestep, class_labels, augment_labels)

        def run(block: Any, x: torch.Tensor) -> torch.Tensor:
            checkpointed: Any = self._gradient_checkpointing_func
            return checkpointed(block, x, embedding) if checkpointing else block(x, embedding)

        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        x, seen, pyramid = self.conv_in(sample), sample, iter(self.pyramid)
        passed = [x]
        for block in self.down_blocks:
            x = run(block, x)
            if block.resample is not None and self.pyramid:
                x = seen = (x + next(pyramid)(seen)) * math.sqrt(0.5)
            passed.append(x)
        for block in self.mid_blocks:
            x = run(block, x)
        for block in self.up_blocks:
            if block.resample is None:
                x = torch.cat([x, passed.pop()], dim=1)
            x = run(block, x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return SongUNet2DOutput(x) if return_dict else (x,)
