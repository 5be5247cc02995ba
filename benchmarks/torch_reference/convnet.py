"""The small convolutional network with batch normalisation and dropout in PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from jaxnets.interop.weights import Table, batch_norm, conv, dense

FEATURES = (32, 64, 128)


class ConvNet(nn.Module):
    """Three stages of convolution, batch normalisation and pooling; takes `[B, C, H, W]`."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        height, width, channels = _last_map(image_shape)
        self.conv1 = nn.Conv2d(image_shape[2], FEATURES[0], 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(FEATURES[0])
        self.conv2 = nn.Conv2d(FEATURES[0], FEATURES[1], 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(FEATURES[1])
        self.conv3 = nn.Conv2d(FEATURES[1], channels, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.dense1 = nn.Linear(channels * height * width, 128)
        self.dropout1 = nn.Dropout(0.3)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify; returns logits `[B, V]`."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        x = torch.flatten(x, 1)
        x = self.dropout1(F.relu(self.dense1(x)))
        return self.head(x)


def table(image_shape: tuple[int, int, int]) -> Table:
    """The map of the weights."""
    return (
        *conv("conv1", use_bias=False),
        *batch_norm("norm1"),
        *conv("conv2", use_bias=False),
        *batch_norm("norm2"),
        *conv("conv3", use_bias=False),
        *batch_norm("norm3"),
        *dense("dense1", flattened=_last_map(image_shape)),
        *dense("head"),
    )


def _last_map(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(H, W, C) before the dense layers."""
    return image_shape[0] // 8, image_shape[1] // 8, FEATURES[2]
