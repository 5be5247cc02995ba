"""Cross-entropy of logits that are never there as a whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import losses

B, T, D, V = 2, 7, 3, 11


def draw():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    return jnp.asarray(hidden), jnp.asarray(table), rng.integers(0, V, (B, T))


def plain(hidden, table, labels, **options):
    return losses.softmax_cross_entropy(hidden @ table.T, labels, **options)


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_it_equals_the_plain_form(chunk, label_smoothing, x64):
    hidden, table, labels = draw()
    along = np.random.default_rng(1).normal(size=(B, T))

    def run(fn, hidden, table):
        fn = partial(fn, labels=labels, label_smoothing=label_smoothing)
        out, pull = jax.vjp(fn, hidden, table)
        return out, pull(jnp.asarray(along))

    expected = jax.jit(partial(run, plain))(hidden, table)
    chunked = jax.jit(partial(run, partial(losses.chunked_cross_entropy, chunk=chunk)))(hidden, table)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), chunked, expected)


def test_memory_does_not_hold_the_logits():
    def peak(fn, length):
        shapes = jax.ShapeDtypeStruct((1, length, 8), jnp.float32), jnp.zeros((500, 8))
        labels = jnp.zeros((1, length), jnp.int32)
        loss = jax.grad(lambda x, table: jnp.sum(fn(x, table, labels)), (0, 1))
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    chunked = partial(losses.chunked_cross_entropy, chunk=64)
    logits = 4 * 500 * 2048
    assert peak(plain, 2048) >= logits
    assert peak(chunked, 2048) < logits / 6
    assert peak(chunked, 2048) - peak(chunked, 1024) < 4 * 1024 * 8 * 12


def test_a_label_out_of_range_is_nan_and_what_fills_up_is_not():
    hidden, table, labels = draw()
    labels[0, 2] = V
    loss = losses.chunked_cross_entropy(hidden, table, labels, chunk=4)
    assert loss.shape == (B, T)
    assert np.isnan(loss).sum() == 1
    assert np.isnan(loss[0, 2])
    with pytest.raises(ValueError, match="at least 1 place, not 0"):
        losses.chunked_cross_entropy(hidden, table, labels, chunk=0)
