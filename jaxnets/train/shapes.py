"""A guard against compiling again and again: it says which argument has changed its shape or dtype."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.typing import PyTree

Signature = Mapping[str, str]
_WIDE = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
_NARROW = {np.dtype(wide): np.dtype(narrow) for wide, narrow in _WIDE.items()}  # what JAX makes of them


def shapes_of(batch: PyTree) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's arrays, for each of which a step is a program of its own."""
    return tuple(np.shape(x) for x in jax.tree.leaves(batch))


class ShapeGuard:
    """Calls a compiled `step(state, batch)` and warns of what makes it compile anew.

    `jax.jit` compiles once for each signature: structure, shapes and dtypes of all leaves. The first
    signatures are expected (one, or as many as there are buckets); each further one gives one warning
    that names the leaves which differ from the nearest signature before.

    A call costs a few microseconds: a state that this step returned itself is known by identity, and of
    the batch only shapes and dtypes are compared.

    Args:
        step: `step(state, batch)`; if it returns a tuple, the first part is the next state.
        num_expected: how many signatures are no news.
        name: of the step, for the warning.
        warn: called with the text; a `UserWarning` by default.

    Example:
        >>> step = ShapeGuard(lambda state, batch: (state, {}), warn=print)
        >>> state, _ = step(np.zeros(2), {"x": np.zeros((4, 8), np.float32)})
        >>> state, _ = step(state, {"x": np.zeros((3, 8), np.float32)})
        the step is compiled again for its signature no. 2: batch['x'] float32[4,8] -> float32[3,8]
    """

    def __init__(
        self,
        step: Callable[[PyTree, PyTree], Any],
        *,
        num_expected: int = 1,
        name: str = "the step",
        warn: Callable[[str], Any] | None = None,
    ):
        self._step, self._num_expected, self._name = step, num_expected, name
        self._warn = warn or (lambda text: warnings.warn(text, UserWarning, stacklevel=3))
        self._known: dict[tuple[int, int], Signature] = {}  # what it was called with, in words
        self._numbers: dict[Any, int] = {}  # of states and batches, by structure, shapes and dtypes
        self._returned: Any = None  # the newest state
        self._returned_number = 0
        self._next_numbers: dict[tuple[int, int], int] = {}  # of the state that a signature returns
        self._batch_kind: Any = None  # the last one
        self._batch_number = 0

    @property
    def num_signatures(self) -> int:
        """How many signatures there have been."""
        return len(self._known)

    def __call__(self, state: PyTree, batch: PyTree) -> Any:
        """Do the step."""
        is_own = state is self._returned and state is not None
        state_number = self._returned_number if is_own else self._number(_kind(state))
        batch_kind = _kind(batch)
        if batch_kind != self._batch_kind:  # comparing is quicker than hashing
            self._batch_kind, self._batch_number = batch_kind, self._number(batch_kind)
        key = state_number, self._batch_number
        is_new = key not in self._known
        if is_new:
            signature = {**_write("state", state), **_write("batch", batch)}
            if len(self._known) >= self._num_expected:
                self._warn(
                    f"{self._name} is compiled again for its signature no. {len(self._known) + 1}: "
                    + _differences(self._known.values(), signature)
                )
            self._known[key] = signature
        result = self._step(state, batch)
        self._returned = result[0] if isinstance(result, tuple) else None
        if self._returned is not None:
            # What a compiled program returns has the same shapes every time.
            if key not in self._next_numbers:
                self._next_numbers[key] = self._number(_kind(self._returned))
            self._returned_number = self._next_numbers[key]
        return result

    def _number(self, kind: Any) -> int:
        return self._numbers.setdefault(kind, len(self._numbers))


def _kind(tree: PyTree) -> Any:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple([_kind_of_leaf(leaf) for leaf in leaves])


def _kind_of_leaf(leaf: Any) -> tuple[tuple[int, ...], Any, bool]:
    """Shape, dtype, and whether the dtype is only weak, all as a compiled function takes them."""
    if isinstance(leaf, np.ndarray | np.generic):
        dtype = leaf.dtype
        has_64_bits = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        return leaf.shape, dtype if has_64_bits else _NARROW.get(dtype, dtype), False
    aval = getattr(leaf, "aval", None)
    if aval is None:  # a number of Python's
        return (), jnp.result_type(leaf), not isinstance(leaf, bool)
    return aval.shape, aval.dtype, aval.weak_type


def _write(root: str, tree: PyTree) -> Signature:
    """Each leaf's path with its dtype and shape."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shape, dtype, is_weak = _kind_of_leaf(leaf)
        text = f"{dtype}[{','.join(map(str, shape))}]{', weakly typed' if is_weak else ''}"
        found[root + jax.tree_util.keystr(path)] = text
    return found


def _differences(known: Any, new: Signature) -> str:
    """What differs from the nearest of the known signatures."""

    def between(old: Signature) -> list[str]:
        names = list(dict.fromkeys([*old, *new]))
        return [
            f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
            for name in names
            if old.get(name) != new.get(name)
        ]

    nearest = min((between(old) for old in known), key=len)
    shown = "; ".join(nearest[:4]) or "the structure of its arguments"
    return shown + (f"; and {len(nearest) - 4} more" if len(nearest) > 4 else "")
