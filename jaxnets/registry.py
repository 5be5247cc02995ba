"""Names for components: models, data sets, optimizers.

A name stands for a function, given as itself or as the string "module:function", which is imported
when the name is first looked up. So listing what there is imports nothing.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any

from jaxnets import errors

_entries: dict[str, dict[str, str | Callable[..., Any]]] = {
    "model": {
        "lenet": "jaxnets.models.lenet:lenet",
        "convnet": "jaxnets.models.convnet:convnet",
        "mlp": "jaxnets.models.mlp:mlp",
        "resnet18": "jaxnets.models.resnet:resnet18",
        "resnet34": "jaxnets.models.resnet:resnet34",
        "resnet50": "jaxnets.models.resnet:resnet50",
        "resnet101": "jaxnets.models.resnet:resnet101",
        "resnet152": "jaxnets.models.resnet:resnet152",
        "speednet": "jaxnets.models.speednet:speednet",
    },
    "dataset": {
        "cifar10": "jaxnets.data.cifar:load_cifar10",
        "digits": "jaxnets.data.digits:load_digits",
        "mnist": "jaxnets.data.idx:load_mnist",
    },
    "optimizer": {
        "sgd": "jaxnets.train.optim:sgd",
        "adam": "jaxnets.train.optim:adam",
        "adamw": "jaxnets.train.optim:adamw",
        "nadamw": "jaxnets.train.optim:nadamw",
        "lamb": "jaxnets.train.optim:lamb",
        "lion": "jaxnets.train.optim:lion",
        "rmsprop": "jaxnets.train.optim:rmsprop",
        "adagrad": "jaxnets.train.optim:adagrad",
        "muon": "jaxnets.train.optim:muon",
    },
}


def kinds() -> list[str]:
    """The kinds of component that have names, in the order in which they are listed."""
    return list(_entries)


def names(kind: str) -> list[str]:
    """The registered names of one kind, sorted."""
    return sorted(_table(kind))


def register(kind: str, name: str, target: str | Callable[..., Any]) -> None:
    """Give a component a name.

    Args:
        kind: one of `kinds()`.
        name: the new name.
        target: the function itself, or "module:function", imported on first use.

    Raises:
        ConfigError: if the kind is unknown, the name is taken, or a string isn't "module:function".
    """
    table = _table(kind)
    if name in table:
        raise errors.ConfigError(f"{kind} {name!r} is already registered")
    if isinstance(target, str) and not re.fullmatch(r"[\w.]+:\w+", target):
        raise errors.ConfigError(f"{kind} {name!r}: {target!r} is not 'module:function'")
    table[name] = target


def unregister(kind: str, name: str) -> None:
    """Take a name away again.

    Raises:
        ConfigError: if there is no such name.
    """
    table = _table(kind)
    if name not in table:
        raise errors.unknown(kind, name, table)
    del table[name]


def get(kind: str, name: str) -> Callable[..., Any]:
    """The function behind a name.

    Raises:
        ConfigError: if there is no such name; the message has the nearest one.

    Example:
        >>> get("model", "lenet").__name__
        'lenet'
    """
    table = _table(kind)
    if name not in table:
        raise errors.unknown(kind, name, table)
    target = table[name]
    return resolve(target) if isinstance(target, str) else target


def resolve(target: str) -> Callable[..., Any]:
    """Import what "module:function" names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _table(kind: str) -> dict[str, str | Callable[..., Any]]:
    if kind not in _entries:
        raise errors.unknown("kind of component", kind, _entries)
    return _entries[kind]
