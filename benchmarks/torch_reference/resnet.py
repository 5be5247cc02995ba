"""ResNet in PyTorch, with the stem for small images."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from jaxnets.interop.weights import Row, Table, batch_norm, conv, dense

STAGES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
_BASIC = ("resnet18", "resnet34")


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, is_bottleneck: bool):
        super().__init__()
        if is_bottleneck:
            layers = ((width, 1, 1), (width, 3, stride), (4 * width, 1, 1))
        else:
            layers = ((width, 3, stride), (width, 3, 1))
        before = channels
        for i, (features, side, step) in enumerate(layers, start=1):
            made = nn.Conv2d(before, features, side, step, padding=side // 2, bias=False)
            self.add_module(f"conv{i}", made)
            self.add_module(f"norm{i}", nn.BatchNorm2d(features))
            before = features
        self.depth = len(layers)
        self.has_shortcut = stride != 1 or channels != before
        if self.has_shortcut:
            self.shortcut = nn.Conv2d(channels, before, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C', H / stride, W / stride]`."""
        y = x
        for i in range(1, self.depth + 1):
            if i > 1:
                y = F.relu(y)
            y = self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(y))
        if self.has_shortcut:
            x = self.shortcut_norm(self.shortcut(x))
        return F.relu(x + y)


class ResNet(nn.Module):
    """A 3x3 stem, stages of blocks and a head; takes `[B, C, H, W]`."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        stages: Sequence[int],
        is_bottleneck: bool,
    ):
        super().__init__()
        self.stem = nn.Conv2d(image_shape[2], 64, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        channels = 64
        self.names: list[str] = []
        for i, num_blocks in enumerate(stages):
            for j in range(num_blocks):
                width = 64 * 2**i
                name = f"stage{i + 1}_block{j + 1}"
                stride = 2 if i > 0 and j == 0 else 1
                self.add_module(name, Block(channels, width, stride, is_bottleneck))
                self.names.append(name)
                channels = 4 * width if is_bottleneck else width
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify; returns logits `[B, V]`."""
        x = F.relu(self.stem_norm(self.stem(x)))
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.head(x.mean((2, 3)))


def make(name: str) -> Callable[[tuple[int, int, int], int], ResNet]:
    """The function that builds a variant."""
    return lambda image_shape, num_classes: ResNet(
        image_shape, num_classes, STAGES[name], name not in _BASIC
    )


def make_table(name: str) -> Callable[[tuple[int, int, int]], Table]:
    """The function that gives the map of a variant's weights."""

    def table(image_shape: tuple[int, int, int]) -> Table:
        model = make(name)(image_shape, 1)
        rows: list[Row] = [*conv("stem", use_bias=False), *batch_norm("stem_norm")]
        for path in model.names:
            block = model.get_submodule(path)
            assert isinstance(block, Block)
            for i in range(1, block.depth + 1):
                rows += conv(f"{path}/conv{i}", use_bias=False)
                rows += batch_norm(f"{path}/norm{i}")
            if block.has_shortcut:
                rows += conv(f"{path}/shortcut", use_bias=False)
                rows += batch_norm(f"{path}/shortcut_norm")
        return (*rows, *dense("head"))

    return table
