"""Types that several parts share, and the legend of axis letters.

Local arrays of rank 2 and up end in the letters of their axes (`logits_BV`, `image_BHWC`):
B batch, T query or time, S key or source, D model width, F hidden width, N heads, K width of a
head, V vocabulary or classes, H W C height, width, channels, A anchors or boxes, P patches,
L layers. Images are NHWC.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

Array = jax.Array
PyTree = Any
Params = Any
Batch = Mapping[str, Any]
"""Named arrays with the same leading axis B. `index` is the row's place in the data set, `mask` is
false for rows that only fill up the batch."""

Metrics = Mapping[str, Any]
"""Named pytrees of sums with `compute()`, such as `jaxnets.metrics.Mean`."""

LossFn = Callable[..., tuple[Mapping[str, Array], PyTree, Metrics]]
"""`loss_fn(params, model_state, batch, *, key) -> ({term: losses [B, ...]}, model_state, metrics)`"""

WeightsFn = Callable[[Batch], Mapping[str, Array]]
"""`weights_fn(batch) -> {term: weights [B, ...]}`; it depends on the batch alone."""

EvalFn = Callable[..., Metrics]
"""`eval_fn(params, model_state, batch) -> {name: metric}`"""


class Indexed(Protocol):
    """What can be counted and indexed: a list of batches, or `jaxnets.data.Batches`."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, i: int, /) -> Any:
        """The i-th, from 0."""
        ...


Hook = Callable[..., str | None]
"""`hook(step, state, metrics) -> None`, or the reason why the run should stop here."""
