"""Random bits that belong to a row and a place in it, not to a device or a step of a generator.

A counter-based generator in the sense of Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3", with an integer hash in place of a cipher: element p of row r gets hash(key, r, p). The bits
are the same however the rows are spread over devices or split into micro-batches, and the whole
computation is elementwise, so XLA fuses it into whatever uses the bits.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.typing import Array


def mix(x: Array) -> Array:
    """A bijection of uint32 in which every input bit flips every output bit half of the time.

    The constants are those of "lowbias32" (Wellons 2018, "Prospecting for hash functions").
    """
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x21F0AAAD)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def row_bits(key: Array, rows: Array, row_shape: tuple[int, ...], places: Array | None = None) -> Array:
    """32 random bits for every element of every row.

    Args:
        key: a PRNG key, scalar.
        rows: integers `[B]`, what identifies each row; two rows with one id get the same bits.
        row_shape: the shape of a row; fewer than 2**32 elements.
        places: uint32 of that shape, which number each element has, and its bits belong to; counted in
            order by default, which with padding on any axis but the first is another one.

    Returns:
        uint32 `[B, *row_shape]`.

    Example:
        >>> bits = row_bits(jax.random.key(0), jnp.array([7, 9, 7]), (5,))
        >>> bits.shape, bool((bits[0] == bits[2]).all()), bool((bits[0] == bits[1]).any())
        ((3, 5), True, False)
    """
    words = jax.random.key_data(key).reshape(-1).astype(jnp.uint32)
    first, second = words[0], words[-1]
    row_B = mix(mix(rows.astype(jnp.uint32) ^ first) + second)
    place = mix((_counted(row_shape) if places is None else places) + second)
    return mix(place[None] ^ row_B.reshape((-1,) + (1,) * len(row_shape)))


def _counted(row_shape: tuple[int, ...]) -> Array:
    place = jnp.zeros(row_shape, jnp.uint32)
    for axis in range(len(row_shape)):
        stride = math.prod(row_shape[axis + 1 :])
        place = place + lax.broadcasted_iota(jnp.uint32, row_shape, axis) * jnp.uint32(stride)
    return place


def pair_places(row_shape: tuple[int, ...], first: Array | int = 0) -> Array:
    """Numbers for the elements `[N, T, S]` of a row that depend neither on T nor on S.

    So what belongs to query t and key s of head n stays the same however both sequences are padded.
    (t, s) is numbered by Szudzik's pairing function: all pairs below any length come before the others.

    Args:
        row_shape: N, T and S.
        first: the number of the first query, if these are a part of all.

    Returns:
        uint32 `[N, T, S]`, each number once while N max(T, S)**2 is at most 2**32.

    Example:
        >>> pair_places((1, 2, 3)).tolist()
        [[[0, 1, 4], [2, 3, 5]]]
    """
    head, t, s = (lax.broadcasted_iota(jnp.uint32, row_shape, axis) for axis in range(3))
    t = t + jnp.asarray(first, jnp.uint32)
    pair = jnp.where(t < s, s * s + t, t * t + t + s)
    return pair * jnp.uint32(row_shape[0]) + head
