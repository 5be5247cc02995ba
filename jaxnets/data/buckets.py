"""Inputs of varying size in few shapes: each is filled up to the next of a small set of sizes.

A compiled step is compiled anew for every shape that it meets, so free sizes would compile all the time;
a handful of buckets compiles a handful of times. What was filled up is masked, and so doesn't count.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxnets import errors

Size = int | Sequence[int]


def bucket_of(size: Size, buckets: Sequence[Size]) -> tuple[int, ...]:
    """The smallest bucket that holds something.

    Args:
        size: a length, or one for each axis, at least 0.
        buckets: sizes of the same kind, in any order.

    Returns:
        one of the buckets, as a tuple; of several that fit the one of least volume.

    Raises:
        DataError: if it fits into none.
        ConfigError: if there are no buckets, or they have other numbers of axes.

    Example:
        >>> bucket_of(70, (32, 64, 128)), bucket_of((30, 40), ((32, 32), (64, 32), (32, 64)))
        ((128,), (32, 64))
    """
    wanted, known = _axes(size), [_axes(bucket) for bucket in buckets]
    if not known or any(len(bucket) != len(wanted) or min(bucket) < 1 for bucket in known):
        raise errors.ConfigError(f"buckets for sizes such as {size} can't be {list(buckets)}")
    fitting = [b for b in known if all(n <= m for n, m in zip(wanted, b, strict=True))]
    if not fitting:
        raise errors.DataError(
            f"size {size} fits into none of the buckets {list(buckets)}: add a larger one, or cut it"
        )
    return min(fitting, key=lambda bucket: (math.prod(bucket), bucket))


def pad_to(x: np.ndarray, size: Size, *, fill: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fill an array up at the end of its first axes.

    Args:
        x: `[T, ...]`, or with more axes that vary, such as `[H, W, C]`.
        size: of the result in those axes.
        fill: what to fill up with.

    Returns:
        the array, and a mask of shape `size`, true where x was.

    Raises:
        ValueError: if x is larger than that, or has fewer axes.

    Example:
        >>> pad_to(np.array([5, 6]), 3)
        (array([5, 6, 0]), array([ True,  True, False]))
    """
    target = _axes(size)
    if len(target) > x.ndim or any(n > m for n, m in zip(x.shape, target, strict=False)):
        raise ValueError(f"an array of shape {x.shape} can't be filled up to {target}")
    place = tuple(slice(n) for n in x.shape[: len(target)])
    padded = np.full(target + x.shape[len(target) :], fill, x.dtype)
    mask = np.zeros(target, np.bool_)
    padded[place], mask[place] = x, True
    return padded, mask


def pad_batch(
    examples: Sequence[Mapping[str, np.ndarray]],
    buckets: Sequence[Size],
    *,
    varying: Sequence[str],
    mask: str,
    fill: Mapping[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """Stack examples of varying size in the smallest bucket that holds them all.

    Args:
        examples: B of them, `{name: array}` with the same names.
        buckets: as in `bucket_of`.
        varying: the names whose first axes vary, together in each example.
        mask: the name that the mask gets.
        fill: what to fill each of those up with; 0 by default.

    Returns:
        `{name: [B, ...]}`, those that vary as `[B, *bucket, ...]`, and the mask, bool `[B, *bucket]`.

    Raises:
        DataError: if an example fits into no bucket, or its arrays differ in size.

    Example:
        >>> examples = [{"token": np.arange(n), "label": np.int32(n)} for n in (2, 3)]
        >>> batch = pad_batch(examples, (4, 8), varying=["token"], mask="token_mask")
        >>> batch["token"].tolist(), batch["token_mask"].sum(), batch["label"].tolist()
        ([[0, 1, 0, 0], [0, 1, 2, 0]], np.int64(5), [2, 3])
    """
    num_axes = len(_axes(buckets[0])) if buckets else 1
    sizes = []
    for example in examples:
        found = {name: example[name].shape[:num_axes] for name in varying}
        if len(set(found.values())) != 1:
            raise errors.DataError(f"arrays of one example differ in size: {found}")
        sizes.append(next(iter(found.values())))
    bucket = bucket_of(np.max(sizes, axis=0).tolist(), buckets)
    batch = {
        name: np.stack([np.asarray(example[name]) for example in examples])
        for name in examples[0]
        if name not in varying
    }
    for name in varying:
        pairs = [pad_to(e[name], bucket, fill=(fill or {}).get(name, 0)) for e in examples]
        batch[name] = np.stack([padded for padded, _ in pairs])
        batch[mask] = np.stack([is_there for _, is_there in pairs])
    return batch


def _axes(size: Size) -> tuple[int, ...]:
    return (size,) if isinstance(size, int | np.integer) else tuple(size)
