"""The multilayer perceptron in PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from jaxnets.interop.weights import Table, dense


class MLP(nn.Module):
    """Two hidden layers with ReLU and dropout over the flattened image; takes `[B, C, H, W]`."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        height, width, channels = image_shape
        self.dense1 = nn.Linear(height * width * channels, 256)
        self.dropout1 = nn.Dropout(0.1)
        self.dense2 = nn.Linear(256, 128)
        self.dropout2 = nn.Dropout(0.1)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify; returns logits `[B, V]`."""
        x = torch.flatten(x, 1)
        x = self.dropout1(F.relu(self.dense1(x)))
        x = self.dropout2(F.relu(self.dense2(x)))
        return self.head(x)


def table(image_shape: tuple[int, int, int]) -> Table:
    """The map of the weights."""
    return (*dense("dense1", flattened=image_shape), *dense("dense2"), *dense("head"))
