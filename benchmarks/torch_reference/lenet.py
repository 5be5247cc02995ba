"""LeNet in PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from jaxnets.interop.weights import Table, conv, dense


class LeNet(nn.Module):
    """Two 5x5 convolutions with pooling, then three dense layers; takes `[B, C, H, W]`."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        height, width, channels = _last_map(image_shape)
        self.conv1 = nn.Conv2d(image_shape[2], 6, 5)
        self.conv2 = nn.Conv2d(6, channels, 5)
        self.dense1 = nn.Linear(channels * height * width, 120)
        self.dense2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify; returns logits `[B, V]`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.dense1(x))
        x = F.relu(self.dense2(x))
        return self.head(x)


def table(image_shape: tuple[int, int, int]) -> Table:
    """The map of the weights."""
    return (
        *conv("conv1"),
        *conv("conv2"),
        *dense("dense1", flattened=_last_map(image_shape)),
        *dense("dense2"),
        *dense("head"),
    )


def _last_map(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(H, W, C) before the dense layers."""
    height, width = (((n - 4) // 2 - 4) // 2 for n in image_shape[:2])
    return height, width, 16
