"""A device that runs out of memory: one line that says what for, and what to do."""

import contextlib
from collections.abc import Iterator

import jax

from jaxnets import errors
from jaxnets.errors import first_line
from jaxnets.recipe import Recipe
from jaxnets.runner import make_state
from jaxnets.train.sharding import Strategy


@contextlib.contextmanager
def explained(recipe: Recipe, strategy: Strategy, *, is_training: bool = True) -> Iterator[None]:
    """Say in one line what a device had no memory for, whatever asked for it in here.

    Args:
        recipe: whose batch and model take it.
        strategy: on which devices.
        is_training: false for evaluation alone.

    Raises:
        DeviceMemoryError: in place of JAX's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not errors.is_out_of_memory(error):
            raise
        raise errors.DeviceMemoryError(_advice(recipe, strategy, is_training, error)) from error


def _advice(recipe: Recipe, strategy: Strategy, is_training: bool, error: Exception) -> str:
    size = recipe.batch_size if is_training else recipe.eval_batch_size
    rows = -(-size // (strategy.num_parts * (recipe.accumulate if is_training else 1)))
    leaves = jax.tree.leaves(strategy.abstract(make_state(recipe)))
    whole = sum(_num_bytes(x.shape, x.dtype) for x in leaves)
    here = sum(_num_bytes(x.sharding.shard_shape(x.shape), x.dtype) for x in leaves)
    means = ["a smaller --batch-size"] if is_training else ["a smaller Recipe.eval_batch_size"]
    if is_training:
        means.append(f"more micro-batches (--accumulate {2 * recipe.accumulate})")
        means.append("a model that keeps less for its gradient (remat), where it has that")
    if here == whole and strategy.num_devices > 1:
        means.append("--strategy fsdp, which cuts the state over the devices")
    part = "" if here == whole else f" of {whole:,}"
    return (
        f"a device is out of memory ({first_line(error)}); the batch of {size} is {rows} examples at a "
        f"time on a device, and the model's parameters and moments take {here:,}{part} bytes there: try "
        f"{', '.join(means)}"
    )


def _num_bytes(shape: tuple[int, ...], dtype: jax.numpy.dtype) -> int:
    size = 8 if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
    for length in shape:
        size *= length
    return size
