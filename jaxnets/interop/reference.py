"""What an experiment's PyTorch reference consists of, and how it is found."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxnets import errors, registry
from jaxnets.interop.weights import Table


@dataclasses.dataclass(frozen=True)
class Reference:
    """The same experiment in PyTorch. Tensors are made on the CPU; the duel moves them.

    Attributes:
        make_model: `make_model() -> nn.Module`, in PyTorch's default dtype.
        loss_fn: `loss_fn(model, batch) -> loss []`, the mean over the batch.
        predict_fn: `predict_fn(model, batch) -> logits [B, V]`.
        make_optimizer: `make_optimizer(parameters, fused=None, foreach=None) -> Optimizer`.
        make_resident: `make_resident(arrays, channels_last=...) -> tensors`: the training set
            `{name: [N, ...]}` as PyTorch likes it best in memory.
        take: `take(resident, index, channels_last=...) -> batch`, the rows of a draw.
        weights: the map of the weights.
        takes_position: whether it is `take(resident, index, position, channels_last=...)`, where what
            is drawn belongs to a row's place in the run, such as sampled negatives.
    """

    make_model: Callable[[], Any]
    loss_fn: Callable[[Any, Mapping[str, Any]], Any]
    predict_fn: Callable[[Any, Mapping[str, Any]], Any]
    make_optimizer: Callable[..., Any]
    make_resident: Callable[..., Mapping[str, Any]]
    take: Callable[..., Mapping[str, Any]]
    weights: Table
    takes_position: bool = False

    def places(self, draw: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """What `take` gets of a draw, int64 `[B]` each."""
        names = ("index", "position") if self.takes_position else ("index",)
        return tuple(draw[name].astype(np.int64) for name in names)


def require_torch() -> None:
    """Make sure that PyTorch is there.

    Raises:
        ConfigError: if it isn't; the message says how to install it.
    """
    if importlib.util.find_spec("torch") is None:
        raise errors.ConfigError(
            "the duel needs PyTorch, which is not installed; its CPU build will do: pip install torch"
        )


def require_cuda() -> None:
    """Make sure that PyTorch is there and finds a GPU.

    Raises:
        ConfigError: if not.
    """
    require_torch()
    import torch

    if not torch.cuda.is_available():
        raise errors.ConfigError(
            f"JAX is on a GPU, and PyTorch {torch.__version__} finds none; its CPU build can't use one"
        )


def load_reference(name: str, target: str | None, arguments: Mapping[str, Any]) -> Reference:
    """Build the reference of an experiment.

    Args:
        name: of the experiment.
        target: `Recipe.torch_reference`.
        arguments: `Recipe.torch_arguments`.

    Raises:
        ConfigError: if the experiment names none, it can't be found, or PyTorch isn't installed.
    """
    if target is None:
        raise errors.ConfigError(f"the experiment {name} has no PyTorch reference to duel with")
    require_torch()
    try:
        build = registry.resolve(target)
    except (ImportError, AttributeError) as error:
        raise errors.ConfigError(
            f"the PyTorch reference {target} can't be loaded: {error}; run from the repository's root"
        ) from None
    return build(**arguments)
