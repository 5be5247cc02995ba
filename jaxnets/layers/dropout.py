"""Dropout whose mask belongs to the example (Srivastava et al. 2014).

`flax.linen.Dropout` draws one mask for the whole array, so an example's mask changes with its place
in the batch, with the sharding and with gradient accumulation. Here the mask is a function of the
layer's key (which holds the step), the row's id and the place in the row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax.numpy as jnp
from flax import linen as nn

from jaxnets.ops import partition
from jaxnets.ops.hash import row_bits
from jaxnets.typing import Array

_is_off: ContextVar[bool] = ContextVar("dropout_is_off", default=False)


@contextmanager
def without_dropout() -> Iterator[None]:
    """Make every `Dropout` do nothing, in training too: for parity and debugging.

    It counts while a function is traced; one that was compiled before keeps its dropout.

    Example:
        >>> with without_dropout():
        ...     Dropout(0.5).apply({}, jnp.ones((1, 3)), train=True).tolist()
        [[1.0, 1.0, 1.0]]
    """
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


def dropout(x: Array, rate: float, *, key: Array, rows: Array, places: Array | None = None) -> Array:
    """Set each element to 0 with probability `rate`, and scale the others by 1 / (1 - rate).

    Args:
        x: `[B, ...]`.
        rate: probability, in [0, 1]; rounded to a multiple of 2**-32.
        key: a PRNG key.
        rows: `[B]`, the id of each row.
        places: as of `jaxnets.ops.row_bits`.

    Returns:
        `[B, ...]`, of x's dtype.

    Raises:
        ValueError: if the rate is outside of [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a dropout rate lies in [0, 1]; this one is {rate}")
    if rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    threshold = min(round(rate * 2**32), 2**32 - 1)
    keep = row_bits(key, rows, x.shape[1:], places) >= jnp.uint32(threshold)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


class Dropout(nn.Module):
    """`dropout` with a key from the rng stream "dropout".

    Attributes:
        rate: the probability of setting an element to 0.
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, rows: Array | None = None, places: Array | None = None
    ) -> Array:
        """Drop out in training, do nothing otherwise.

        Args:
            x: `[B, ...]`.
            train: whether this is training.
            rows: `[B]`, the id of each row; its place in the global batch by default.
            places: as of `jaxnets.ops.row_bits`.

        Returns:
            `[B, ...]`.
        """
        if not train or self.rate == 0 or _is_off.get():
            return x
        if rows is None:
            rows = partition.default_rows(x.shape[0])
        return dropout(x, self.rate, key=self.make_rng("dropout"), rows=rows, places=places)

    def of_parts(
        self,
        *,
        train: bool,
        places_of: Callable[[tuple[int, ...], Array], Array],
        rows: Array | None = None,
    ) -> Callable[..., Array] | None:
        """Dropout of an array that comes in parts, for functions that JAX transforms, as for remat.

        Modules can't be called there.

        Args:
            train: whether this is training.
            places_of: `places_of(row_shape, first)` gives the places of the part that begins at `first`.
            rows: `[B]`, as above.

        Returns:
            `drop(x, first)` for a part, `[B, ...]`; the mask of all parts together is that of the whole
            array, if their places are. None if there is nothing to drop.
        """
        if not train or self.rate == 0 or _is_off.get():
            return None
        key = self.make_rng("dropout")

        def drop(x: Array, first: Array) -> Array:
            of = partition.default_rows(x.shape[0]) if rows is None else rows
            return dropout(x, self.rate, key=key, rows=of, places=places_of(x.shape[1:], first))

        return drop
