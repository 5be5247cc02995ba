"""SpeedNet in PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from jaxnets.interop.weights import Row, Table, batch_norm, conv, dense

WIDTHS = (64, 256, 256)


class SpeedNet(nn.Module):
    """Whitening, three stages of two convolutions, a maximum and a head; takes `[B, C, H, W]`."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        channels = 8 * image_shape[2]
        self.whiten = nn.Conv2d(image_shape[2], channels, 2)
        for i, width in enumerate(WIDTHS, start=1):
            for j in (1, 2):
                made = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                self.add_module(f"conv{i}_{j}", made)
                norm = nn.BatchNorm2d(width, momentum=0.4)
                del norm.weight
                norm.register_buffer("weight", torch.ones(width), persistent=False)
                self.add_module(f"norm{i}_{j}", norm)
                channels = width
        self.head = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify; returns logits `[B, V]`."""
        x = F.gelu(self.whiten(x))
        for i in range(1, len(WIDTHS) + 1):
            x = F.max_pool2d(self.get_submodule(f"conv{i}_1")(x), 2)
            x = F.gelu(self.get_submodule(f"norm{i}_1")(x))
            x = self.get_submodule(f"conv{i}_2")(x)
            x = F.gelu(self.get_submodule(f"norm{i}_2")(x))
        x = F.max_pool2d(x, (x.shape[2], x.shape[3]))
        return self.head(torch.flatten(x, 1)) / 16


def table(image_shape: tuple[int, int, int]) -> Table:
    """The map of the weights."""
    del image_shape
    rows: list[Row] = [*conv("whiten")]
    for i in range(1, len(WIDTHS) + 1):
        for j in (1, 2):
            rows += conv(f"conv{i}_{j}", use_bias=False)
            rows += batch_norm(f"norm{i}_{j}", use_scale=False)
    return (*rows, *dense("head", use_bias=False))
