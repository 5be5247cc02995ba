"""The attention RNN against its equations, step by step in PyTorch, and gradients by its autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.tiny_translation import S, T, batch_of, functions, start

pytestmark = pytest.mark.parity


def gru_step(torch, x, state, p):
    """Cho et al. 2014 (arXiv 1406.1078), reset gate behind the product; gates in the order r, z, n."""
    size = state.shape[1]
    of_input, of_state = x @ p["kernel"] + p["bias"], state @ p["recurrent_kernel"]
    both = torch.sigmoid(of_input[:, : 2 * size] + of_state[:, : 2 * size])
    reset, keep = both[:, :size], both[:, size:]
    new = torch.tanh(of_input[:, 2 * size :] + reset * (of_state[:, 2 * size :] + p["recurrent_bias"]))
    return (1 - keep) * new + keep * state


def reference(torch, p, source, target, is_there):
    """Logits `[B, T, V]`."""
    table, size = p["embedding"]["embedding"], p["readout"]["kernel"].shape[1]
    words, said = table[source] * size**0.5, table[target] * size**0.5
    hidden = p["start"]["kernel"].shape[0]
    outputs, ends = {}, {}
    for direction, steps in (("forward", range(S)), ("backward", reversed(range(S)))):
        state, outputs[direction] = torch.zeros(len(source), hidden, dtype=table.dtype), [None] * S
        for s in steps:
            new = gru_step(torch, words[:, s], state, p["encoder"][f"{direction}1"])
            state = torch.where(is_there[:, s, None], new, state)  # as if the padding weren't there
            outputs[direction][s] = state
        ends[direction] = state
    both = [torch.stack(outputs[direction], 1) for direction in ("forward", "backward")]
    memory = torch.cat(both, 2)
    state = torch.tanh(ends["backward"] @ p["start"]["kernel"] + p["start"]["bias"])
    look = p["cross_attention"]
    keys = memory @ look["key"]["kernel"] + look["key"]["bias"]
    gates = {
        "kernel": torch.cat([p["kernel"], p["context_kernel"]]),
        **{name: p[name] for name in ("bias", "recurrent_kernel", "recurrent_bias")},
    }
    logits = []
    for t in range(T):
        asked = torch.tanh((state @ look["query"]["kernel"])[:, None] + keys)
        score = (asked @ look["score"]["kernel"])[..., 0].masked_fill(~is_there, -torch.inf)
        seen = (torch.softmax(score, 1)[..., None] * memory).sum(1)
        state = gru_step(torch, torch.cat([said[:, t], seen], 1), state, gates)
        features = torch.cat([said[:, t], state, seen], 1)
        logits.append(torch.tanh(features @ p["readout"]["kernel"] + p["readout"]["bias"]) @ table.T)
    return torch.stack(logits, 1)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-5)])
def test_logits_and_gradients(dtype, bound, x64):
    torch = pytest.importorskip("torch")
    batch = batch_of()
    params = start("attention_rnn", np.dtype(dtype))
    apply_fn = functions("attention_rnn")[1]
    theirs = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), params)
    sides = (torch.tensor(np.asarray(batch["tokens"][name])).long() for name in ("source", "target"))
    expected = reference(torch, theirs, *sides, torch.tensor(np.asarray(batch["source_mask"])))
    with jax.default_matmul_precision("highest"):
        logits, pull = jax.vjp(
            lambda params: apply_fn(
                params, {}, batch["tokens"], train=False, mask={"source": batch["source_mask"]}
            )[0],
            params,
        )
        along = np.random.default_rng(3).normal(size=logits.shape).astype(dtype)
        (grads,) = pull(jnp.asarray(along))
    (expected * torch.tensor(along)).sum().backward()
    assert logits.dtype == dtype
    expected = expected.detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound * np.abs(expected).max())

    def compare(path, ours, tensor):
        theirs = tensor.grad.numpy()
        atol = bound * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, grads, theirs)
