import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets.losses import softmax_cross_entropy
from jaxnets.metrics import Perplexity


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10))
@settings(deadline=None, max_examples=30)
def test_any_split_into_batches_gives_the_same(count, batch_size, seed):
    rng = np.random.default_rng(seed)
    losses, mask = rng.exponential(2.0, (count, 3)).astype(np.float32), rng.random((count, 3)) < 0.7
    expected = np.exp(losses[mask].mean(dtype=np.float64)) if mask.any() else 1.0
    parts = [
        Perplexity.of(jnp.asarray(losses[i : i + batch_size]), jnp.asarray(mask[i : i + batch_size]))
        for i in range(0, count, batch_size)
    ]
    merged = jax.tree.map(lambda *leaves: sum(np.asarray(x, np.float64) for x in leaves), *parts)
    assert float(merged.compute()) == pytest.approx(expected, rel=1e-6)
    whole = Perplexity.of(jnp.asarray(losses), jnp.asarray(mask))
    assert float(whole.compute()) == pytest.approx(expected, rel=1e-5)


def test_masked_losses_do_not_count_even_as_nan():
    losses = jnp.array([[jnp.log(4.0), jnp.nan], [jnp.log(9.0), 3.0]])
    mask = jnp.array([[True, False], [True, False]])
    assert float(Perplexity.of(losses, mask).compute()) == pytest.approx(6)


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_exp_of_pytorchs_cross_entropy(batch_size, dtype, bound, x64):
    """Of logits and labels, some of which are padding, in batches of any size."""
    import torch

    rng = np.random.default_rng(0)
    logits, labels = (3 * rng.normal(size=(8, 5, 7))).astype(dtype), rng.integers(0, 7, (8, 5))
    mask = rng.random((8, 5)) < 0.7
    labels = np.where(mask, labels, -100)  # which PyTorch leaves out
    flat = torch.tensor(logits).reshape(-1, 7), torch.tensor(labels).reshape(-1)
    expected = torch.nn.functional.cross_entropy(*flat).exp().item()
    of = jax.jit(lambda logits, labels, mask: Perplexity.of(softmax_cross_entropy(logits, labels), mask))
    parts = [
        of(*(x[i : i + batch_size] for x in (logits, labels, mask))) for i in range(0, 8, batch_size)
    ]
    merged = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    assert merged.loss.total.dtype == dtype
    assert float(merged.compute()) == pytest.approx(expected, rel=bound)
