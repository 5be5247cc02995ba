"""The PyTorch reference of the image classifiers: model, loss, optimizer and data.

Written for speed as well: uint8 images stay in memory in the layout that the model wants, a batch
is one `index_select`, and the bytes become numbers after that.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torch_reference import convnet, lenet, mlp, resnet, speednet
from jaxnets import errors
from jaxnets.interop.reference import Reference

_MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "lenet": (lenet.LeNet, lenet.table),
    "convnet": (convnet.ConvNet, convnet.table),
    "mlp": (mlp.MLP, mlp.table),
    "speednet": (speednet.SpeedNet, speednet.table),
    **{name: (resnet.make(name), resnet.make_table(name)) for name in resnet.STAGES},
}
_OPTIMIZERS = ("sgd", "adam", "adamw")


def reference(
    *,
    model: str,
    image_shape: Sequence[int],
    num_classes: int,
    optimizer: str,
    learning_rate: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    dtype: str = "float32",
    **others: Any,
) -> Reference:
    """Build a classifier's reference.

    Args:
        model: lenet, convnet, mlp, speednet, or resnet18 to resnet152.
        image_shape: (H, W, C).
        num_classes: V.
        optimizer: sgd, adam or adamw.
        learning_rate: per step.
        momentum: of sgd; the decay of the first moment for the others.
        weight_decay: as PyTorch's optimizer of that name has it.
        label_smoothing: probability taken from the label.
        dtype: of the computation: "float32" is PyTorch's default dtype; "bfloat16" is autocast, with
            parameters and loss in that.
        others: parts of the recipe in use that the reference doesn't have.

    Raises:
        ConfigError: if there is no such model or optimizer, or there are other parts.
    """
    if model not in _MODELS:
        raise errors.unknown("PyTorch reference", model, _MODELS)
    if optimizer not in _OPTIMIZERS:
        raise errors.unknown("PyTorch optimizer", optimizer, _OPTIMIZERS)
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise errors.ConfigError(f"the PyTorch reference does not have {flags}; leave it out")
    make, table = _MODELS[model]
    height, width, channels = image_shape
    shape = (height, width, channels)

    def predict_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        image = (batch["image"].to(torch.get_default_dtype()) / 255 - 0.5) / 0.5
        if dtype == "float32":
            return model(image)
        with torch.autocast(image.device.type, getattr(torch, dtype)):
            return model(image).to(torch.get_default_dtype())

    def loss_fn(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(predict_fn(model, batch), batch["label"], label_smoothing=label_smoothing)

    def make_optimizer(
        parameters: Iterable[nn.Parameter],
        *,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> torch.optim.Optimizer:
        how: Any = {"lr": learning_rate, "weight_decay": weight_decay}
        how |= {"fused": fused, "foreach": foreach}
        if optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=momentum, **how)
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, betas=(momentum, 0.999), eps=1e-8, **how)

    return Reference(
        make_model=lambda: make(shape, num_classes),
        loss_fn=loss_fn,
        predict_fn=predict_fn,
        make_optimizer=make_optimizer,
        make_resident=make_resident,
        take=take,
        weights=table(shape),
    )


def make_resident(
    arrays: Mapping[str, np.ndarray], *, channels_last: bool = False
) -> dict[str, torch.Tensor]:
    """The training set in memory.

    Args:
        arrays: `image` uint8 `[N, H, W, C]`, `label` `[N]`.
        channels_last: whether images stay as they are; otherwise they become `[N, C, H, W]`.
    """
    image = torch.from_numpy(np.require(arrays["image"], requirements=["C", "W"]))
    if not channels_last:
        image = image.permute(0, 3, 1, 2).contiguous()
    return {"image": image, "label": torch.from_numpy(arrays["label"].astype(np.int64))}


def take(
    resident: Mapping[str, torch.Tensor], index: torch.Tensor, *, channels_last: bool = False
) -> dict[str, torch.Tensor]:
    """The rows of a draw; images are `[B, C, H, W]`, with the strides of the layout in memory."""
    batch = {name: x.index_select(0, index) for name, x in resident.items()}
    if channels_last:
        batch["image"] = batch["image"].permute(0, 3, 1, 2)
    return batch
