"""The network that the Fréchet inception distance is defined by, from `pt_inception-2015-12-05-6726825d.pth`.

It is Inception v3 (Szegedy et al. 2016) as it was trained in 2015, which differs from the one of torchvision: averages
over 3 x 3 pixels do not count the border, the last block pools by maxima, and there are 1008 classes.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from tonefield.command_line import UserError


SIZE = 299
CLASSES = 1008

# A layer has a name, channels and a kernel. Kernels are padded so that sizes stay; with a "v" in front they are not,
# with an "s" they have a stride of 2 as well. Layers whose names end in a and b see the same input.
Layer = tuple[str, int, str]


def _block_a(pool: int) -> dict[str, list[Layer]]:
    return {
        "branch1x1": [("", 64, "1")],
        "branch5x5": [("_1", 48, "1"), ("_2", 64, "5")],
        "branch3x3dbl": [("_1", 64, "1"), ("_2", 96, "3"), ("_3", 96, "3")],
        "branch_pool": [("", pool, "1")],
    }


def _block_c(width: int) -> dict[str, list[Layer]]:
    return {
        "branch1x1": [("", 192, "1")],
        "branch7x7": [("_1", width, "1"), ("_2", width, "1x7"), ("_3", 192, "7x1")],
        "branch7x7dbl": [
            ("_1", width, "1"), ("_2", width, "7x1"), ("_3", width, "1x7"), ("_4", width, "7x1"), ("_5", 192, "1x7"),
        ],
        "branch_pool": [("", 192, "1")],
    }  # fmt: skip


BLOCK_B = {
    "branch3x3": [("", 384, "s3")],
    "branch3x3dbl": [("_1", 64, "1"), ("_2", 96, "3"), ("_3", 96, "s3")],
}
BLOCK_D = {
    "branch3x3": [("_1", 192, "1"), ("_2", 320, "s3")],
    "branch7x7x3": [("_1", 192, "1"), ("_2", 192, "1x7"), ("_3", 192, "7x1"), ("_4", 192, "s3")],
}
BLOCK_E = {
    "branch1x1": [("", 320, "1")],
    "branch3x3": [("_1", 384, "1"), ("_2a", 384, "1x3"), ("_2b", 384, "3x1")],
    "branch3x3dbl": [("_1", 448, "1"), ("_2", 384, "3"), ("_3a", 384, "1x3"), ("_3b", 384, "3x1")],
    "branch_pool": [("", 192, "1")],
}

# Name, branches, and how one of them pools: "average" or "maximum" before its layer, "stride" without a layer.
BLOCKS = [
    ("Mixed_5b", _block_a(32), "average"),
    ("Mixed_5c", _block_a(64), "average"),
    ("Mixed_5d", _block_a(64), "average"),
    ("Mixed_6a", BLOCK_B, "stride"),
    ("Mixed_6b", _block_c(128), "average"),
    ("Mixed_6c", _block_c(160), "average"),
    ("Mixed_6d", _block_c(160), "average"),
    ("Mixed_6e", _block_c(192), "average"),
    ("Mixed_7a", BLOCK_D, "stride"),
    ("Mixed_7b", BLOCK_E, "average"),
    ("Mixed_7c", BLOCK_E, "maximum"),
]
STEM: list[Layer] = [
    ("Conv2d_1a_3x3", 32, "s3"),
    ("Conv2d_2a_3x3", 32, "v3"),
    ("Conv2d_2b_3x3", 64, "3"),
    ("Conv2d_3b_1x1", 80, "1"),
    ("Conv2d_4a_3x3", 192, "v3"),
]
POOLED_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")


class Convolution(nn.Module):
    def __init__(self, channels: int, width: int, kernel: str):
        super().__init__()
        sizes = [int(side) for side in kernel.lstrip("sv").split("x")]
        sides = sizes[0], sizes[-1]
        padding = (0, 0) if kernel[0] in "sv" else (sides[0] // 2, sides[1] // 2)
        stride = 2 if kernel[0] == "s" else 1
        self.conv = nn.Conv2d(channels, width, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    def __init__(self, channels: int, branches: dict[str, list[Layer]], pool: str):
        super().__init__()
        self.branches, self.pool = branches, pool
        self.channels = channels if pool == "stride" else 0
        for branch, layers in branches.items():
            before = channels
            for name, width, kernel in layers:
                self.add_module(branch + name, Convolution(before, width, kernel))
                if name[-1:] != "a":  # "b" sees what "a" sees
                    before = width
            self.channels += before if name[-1:] != "b" else 2 * width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for branch, layers in self.branches.items():
            y, halves = x, []
            if branch == "branch_pool":
                if self.pool == "average":
                    y = avg_pool2d(x, 3, 1, 1, count_include_pad=False)
                else:
                    y = max_pool2d(x, 3, 1, 1)
            for name, _, _ in layers:
                layer = getattr(self, branch + name)
                if name[-1:] in ("a", "b"):
                    halves.append(layer(y))
                else:
                    y = layer(y)
            outputs += halves or [y]
        if self.pool == "stride":
            outputs.append(max_pool2d(x, 3, 2))
        return torch.cat(outputs, dim=1)


class InceptionV3(nn.Module):
    """Pictures (batch, 3, 299, 299) in [-1, 1] to 2048 features; `fc` makes logits of them."""

    def __init__(self):
        super().__init__()
        channels = 3
        for name, width, kernel in STEM:
            self.add_module(name, Convolution(channels, width, kernel))
            channels = width
        for name, branches, pool in BLOCKS:
            block = Mixed(channels, branches, pool)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, _, _ in STEM:
            x = getattr(self, name)(x)
            if name in POOLED_AFTER:
                x = max_pool2d(x, 3, 2)
        for name, _, _ in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def load_inception(file: str | Path) -> InceptionV3:
    """The network with the published weights."""
    from tonefield.conversion.command import load_strictly, read_checkpoint

    if not Path(file).is_file():
        raise UserError(f"There is no file {file}: inception= takes pt_inception-2015-12-05-6726825d.pth.")
    weights = read_checkpoint(Path(file))
    with torch.device("meta"):
        model = InceptionV3()
    model = model.to_empty(device="cpu").eval()
    if isinstance(weights, dict):
        # Counters of training steps, which older versions of PyTorch did not write and inference does not need.
        counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        weights = {key: torch.zeros_like(value) for key, value in counters.items()} | weights
    else:
        raise UserError(f"{file} does not hold the weights of a network but a {type(weights).__name__}.")
    load_strictly(model, weights, file)
    return model


def resize_like_tensorflow_1(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """
    Pictures (batch, channels, height, width) to `size` x `size`, as the weights expect them.

    It is `tf.image.resize_bilinear` of TensorFlow 1 (`align_corners=False`, `half_pixel_centers=False`): pixel i of
    the result is read at i * height / size, between two pixels values are linear, beyond the last one they stay, and
    nothing is smoothed before. Against the resizing of today, which reads at (i + 1/2) * height / size - 1/2, pictures
    move by up to half a pixel.
    """
    for dim in (2, 3):
        old = pictures.shape[dim]
        place = torch.arange(size, dtype=torch.float64, device=pictures.device) * (old / size)
        low = place.long().clamp(max=old - 1)
        high = (low + 1).clamp(max=old - 1)
        weight = (place - low).to(pictures.dtype)
        weight = weight[:, None] if dim == 2 else weight
        first, second = pictures.index_select(dim, low), pictures.index_select(dim, high)
        pictures = first + (second - first) * weight
    return pictures
