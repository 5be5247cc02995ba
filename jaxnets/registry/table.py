"""The table of names: register, look up, list, lease."""

import contextlib
import contextvars
import dataclasses
import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from jaxnets import errors

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Component:
    """What there is to know about a name without loading it.

    Attributes:
        kind: one of `kinds()`.
        name: its name.
        source: where the function comes from, as "module:function" or "FILE:function".
        is_loaded: whether that module or file has been run.
        holders: who leases it.
    """

    kind: str
    name: str
    source: str
    is_loaded: bool
    holders: tuple[str, ...]


@dataclasses.dataclass
class Entry:
    """What a name stands for; a string "module:function" is imported on first use."""

    target: str | Function
    origin: str | None = None  # the file or module whose loading registered it
    holders: list[str] = dataclasses.field(default_factory=list)

    @property
    def module(self) -> str | None:
        """The module that is imported for it."""
        return self.target.partition(":")[0] if isinstance(self.target, str) else None


def _built_in(**targets: str) -> dict[str, Entry]:
    return {name: Entry(f"jaxnets.{target}") for name, target in targets.items()}


entries: dict[str, dict[str, Entry]] = {
    "model": _built_in(
        lenet="models.lenet:lenet",
        convnet="models.convnet:convnet",
        mlp="models.mlp:mlp",
        resnet18="models.resnet:resnet18",
        resnet34="models.resnet:resnet34",
        resnet50="models.resnet:resnet50",
        resnet101="models.resnet:resnet101",
        resnet152="models.resnet:resnet152",
        speednet="models.speednet:speednet",
    ),
    "language_model": _built_in(
        gpt="models.gpt:gpt",
        gpt2_small="models.gpt:gpt2_small",
        gpt_100m="models.gpt:gpt_100m",
    ),
    "text_model": _built_in(
        lstm_classifier="models.text_classifier:lstm_classifier",
        weighted_naive_bayes="models.text_classifier:weighted_naive_bayes",
    ),
    "recommender": _built_in(
        matrix_factorization="models.matrix_factorization:matrix_factorization",
        embedding_dot="models.matrix_factorization:embedding_dot",
        neumf="models.neumf:neumf",
        two_tower="models.two_tower:two_tower",
    ),
    "text_encoder": _built_in(
        bert_base="models.bert:bert_base",
    ),
    "translation_model": _built_in(
        transformer="models.transformer:Transformer",
        attention_rnn="models.attention_rnn:AttentionRNN",
    ),
    "layer": _built_in(
        lstm="layers.recurrent:LSTM",
        gru="layers.recurrent:GRU",
        transformer_encoder="models.transformer_stack:encoder",
        transformer_decoder="models.transformer_stack:decoder",
    ),
    "loss": _built_in(
        softmax_cross_entropy="losses.classification:softmax_cross_entropy",
        sigmoid_cross_entropy="losses.classification:sigmoid_cross_entropy",
        squared_error="losses.regression:squared_error",
        huber="losses.regression:huber",
    ),
    "optimizer": _built_in(
        sgd="train.optim:sgd",
        adam="train.optim:adam",
        adamw="train.optim:adamw",
        nadamw="train.optim:nadamw",
        lamb="train.optim:lamb",
        lion="train.optim:lion",
        rmsprop="train.optim:rmsprop",
        adagrad="train.optim:adagrad",
        muon="train.muon:muon",
        muon_sgd="train.muon:muon_sgd",
    ),
    "row_optimizer": _built_in(
        sgd="train.row_optim:sgd",
        adagrad="train.row_optim:adagrad",
        lazy_adam="train.row_optim:lazy_adam",
    ),
    "dataset": _built_in(
        cifar10="data.cifar:load_cifar10",
        digits="data.digits:load_digits",
        mnist="data.idx:load_mnist",
        random_images="data.random_images:load_random_images",
    ),
    "text_dataset": _built_in(
        imdb="data.imdb:load_imdb",
        made_reviews="data.texts:load_made_reviews",
        random_texts="data.texts:load_random_texts",
    ),
    "ratings": _built_in(
        **{
            "generated": "data.generated_ratings:load_generated",
            "generated-1m": "data.generated_ratings:load_generated_1m",
            "ml-latest-small": "data.movielens:load_latest_small",
            "ml-100k": "data.movielens:load_100k",
            "ml-1m": "data.movielens:load_1m",
        }
    ),
}
origins: dict[str, ModuleType] = {}  # by the resolved path of a file, or the name of a module
loading: contextvars.ContextVar[str | None] = contextvars.ContextVar("loading", default=None)
# One lock for the tables, held for moments, and one for what runs a user's code. A module that is
# being imported elsewhere may call `register`, so the first is never held during an import.
lock, changing = threading.RLock(), threading.RLock()


def kinds() -> list[str]:
    """The kinds of component that have names, in the order in which they are listed."""
    return list(entries)


def names(kind: str) -> list[str]:
    """The registered names of one kind, sorted."""
    with lock:
        return sorted(_table(kind))


def components() -> list[Component]:
    """Every name, by kind and name; nothing is imported for it."""
    with lock:
        return [
            Component(
                kind,
                name,
                source_of(entry),
                entry.module is None or entry.module in sys.modules,
                tuple(entry.holders),
            )
            for kind, table in entries.items()
            for name, entry in sorted(table.items())
        ]


def register(kind: str, name: str, target: str | Function) -> None:
    """Give a component a name.

    Args:
        kind: one of `kinds()`.
        name: the new name.
        target: the function itself, or "module:function", imported on first use.

    Raises:
        ConfigError: if the kind is unknown, the name is taken, or a string isn't "module:function".
    """
    with lock:
        table = _table(kind)
        if name in table:
            taken = f"{kind} {name!r} is already registered: it is {source_of(table[name])}"
            raise errors.ConfigError(taken)
        is_target = re.fullmatch(r"[\w.]+:\w+", target) if isinstance(target, str) else callable(target)
        if not is_target:
            what = f"{kind} {name!r}: {target!r} is not 'module:function', nor a function"
            raise errors.ConfigError(what)
        table[name] = Entry(target, origin=loading.get())


def unregister(kind: str, name: str) -> None:
    """Take a name away again.

    Raises:
        ConfigError: if there is no such name, or it is leased.
    """
    with lock:
        entry = find(kind, name)
        refuse_leased({(kind, name): entry}, "unregistered")
        del entries[kind][name]


def get(kind: str, name: str) -> Function:
    """The function behind a name.

    Raises:
        ConfigError: if there is no such name (the message has the nearest one), or what it stands for
            can't be imported or isn't there.

    Example:
        >>> get("model", "lenet").__name__
        'lenet'
    """
    with lock:
        target = find(kind, name).target
    if not isinstance(target, str):
        return target
    try:
        found = resolve(target)
    except ImportError as error:
        raise errors.ConfigError(f"{kind} {name!r}: can't import {target}: {error}") from error
    except AttributeError as error:
        raise errors.ConfigError(f"{kind} {name!r}: there is no {target}: {error}") from error
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise errors.ConfigError(f"{kind} {name!r}: {where}: {error.msg}") from error
    if not callable(found):
        raise errors.ConfigError(f"{kind} {name!r}: {target} is no function but {found!r}")
    return found


def resolve(target: str) -> Function:
    """Import what "module:function" names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


@contextlib.contextmanager
def use(kind: str, name: str, *, by: str) -> Iterator[Function]:
    """Lease a component: while this is open it is neither unloaded nor reloaded.

    Args:
        kind: one of `kinds()`.
        name: of the component.
        by: who asks, for the error that others get.

    Returns:
        the function, as `get` does, and with its errors.

    Example:
        >>> with use("model", "lenet", by="the server") as lenet:
        ...     lenet(num_classes=3).num_classes
        3
    """
    with changing:
        function = get(kind, name)
        with lock:
            entry = find(kind, name)
            entry.holders.append(by)
    try:
        yield function
    finally:
        with lock:
            entry.holders.remove(by)


def _table(kind: str) -> dict[str, Entry]:
    if kind not in entries:
        raise errors.unknown("kind of component", kind, entries)
    return entries[kind]


def find(kind: str, name: str) -> Entry:
    """The entry of a name; the caller holds the lock."""
    table = _table(kind)
    if name not in table:
        error = errors.unknown(kind, name, table)
        raise errors.ConfigError(f"{error}; one of your own needs --plugin FILE with every command")
    return table[name]


def source_of(entry: Entry) -> str:
    """Where the function comes from, as "module:function" or "FILE:function"."""
    if isinstance(entry.target, str):
        return entry.target
    function = getattr(entry.target, "__qualname__", type(entry.target).__name__)
    return f"{entry.origin or getattr(entry.target, '__module__', '?')}:{function}"


def refuse_leased(some: dict[tuple[str, str], Entry], what: str) -> None:
    """Raise if one of the entries is leased; `what` is what can't be done to it."""
    for (kind, name), entry in some.items():
        if entry.holders:
            holders = ", ".join(dict.fromkeys(entry.holders))
            raise errors.ConfigError(f"{kind} {name!r} can't be {what}: it is in use by {holders}")
