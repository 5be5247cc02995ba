"""A step over the devices of several processes computes what it does over those of one."""

import json

import numpy as np
import processes
import pytest

SCRIPT = """
    import functools, hashlib, json
    import jax, numpy as np, optax
    import tiny
    from jaxnets import metrics
    from jaxnets.data import Arrays, Batches, Part, Stream
    from jaxnets.train import (
        Prefetch, create_state, evaluate, make_eval_step, make_strategy, make_train_step
    )
    from jaxnets.train.predict import make_predict_step, predict

    jax.config.update("jax_numpy_rank_promotion", "raise")
    CASES = {cases!r}
    init_fn, loss_fn = tiny.classifier("mlp")
    data, draws, tx = tiny.arrays(), Batches(96, 16, 5 * 16 - 5, seed=3), optax.adam(0.01)
    found = {{}}
    for name, options in CASES.items():
        options = dict(options)
        is_streamed = options.pop("is_streamed", False)
        strategy = make_strategy(**options)
        make_step = functools.partial(make_train_step, loss_fn, tx)
        step = strategy.compile_step(make_step, None if is_streamed else data)
        state = strategy.init(lambda: create_state(init_fn, tx, key=jax.random.key(1)))
        rows = tuple(strategy.rows(16).tolist())
        part = draws if len(rows) == 16 else Part(draws, rows)
        with Prefetch(Stream(Arrays(data), part), strategy.put_batch) as stream:
            fed, losses, ids = stream if is_streamed else draws, [], []
            for i in range(len(draws)):
                batch = fed[i]
                ids += np.asarray(part[i]["index"]).tolist()
                state, values = step(state, batch)
                losses.append(float(values["loss"]))

        def eval_fn(params, model_state, batch):
            terms, _, _ = loss_fn(params, model_state, batch, key=jax.random.key(0))
            return {{"loss": metrics.Mean.of(terms["loss"], batch["mask"])}}

        test = Batches(96, 40, 96, shuffle=False)
        eval_step = strategy.compile_eval(functools.partial(make_eval_step, eval_fn), data)
        evaluated = evaluate(eval_step, state, test)
        whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(strategy.mesh, jax.P()))
        leaves = [np.asarray(x) for x in jax.tree.leaves(whole((state.params, state.opt_state)))]
        bits = hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest()
        norm = float(sum(np.abs(x.astype(np.float64)).sum() for x in leaves))
        found[name] = [losses, evaluated["loss"], evaluated["count"], norm, bits, int(state.step), ids]
    print("FOUND " + json.dumps(found))
"""
CASES = {
    "jit": {},
    "streamed": {"is_streamed": True},
    "mesh": {"sizes": {"data": 2, "fsdp": 2}},
    "pmap": {"name": "pmap"},
    "pmap, streamed": {"name": "pmap", "is_streamed": True},
    "fixed": {"virtual_shards": 8},
    "fixed, streamed": {"virtual_shards": 8, "is_streamed": True},
}


def found(num_processes, devices, cases):
    ended = processes.run(
        SCRIPT.format(cases=cases), num_processes, devices=devices, joined=num_processes > 1, timeout=400
    )
    lines = [line for e in ended for line in e.out.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


@pytest.mark.timeout(800)
@pytest.mark.parametrize(
    ("num_processes", "names"),
    [
        (2, ["mesh"]),
        pytest.param(2, [name for name in CASES if name != "mesh"], marks=pytest.mark.long),
        pytest.param(4, list(CASES), marks=pytest.mark.long),
    ],
)
def test_processes_train_as_one_does(num_processes, names):
    cases = {name: CASES[name] for name in names}
    (one,) = found(1, 1, {name: {**case, "sizes": None} for name, case in cases.items()})
    several = found(num_processes, 4 // num_processes, cases)
    assert len(several) == num_processes
    for name in names:
        losses, loss, count, norm, bits, step, ids = one[name]
        for other in several:
            np.testing.assert_allclose(other[name][0], losses, rtol=1e-5)
            assert other[name][1] == pytest.approx(loss, rel=1e-5)
            assert other[name][3] == pytest.approx(norm, rel=1e-5)
            assert (other[name][2], other[name][5]) == (count, step) == (96, 5)
            if name.startswith("fixed"):
                assert other[name][:5] == [losses, loss, count, norm, bits]
        # Every example is read by one process, and the order is that of one process.
        together = np.concatenate(
            [np.reshape(each[name][6], (len(losses), -1)) for each in several], axis=1
        )
        assert together.reshape(-1).tolist() == ids
    assert len(set(losses)) == len(losses)


LATE = """
    import time
    from jaxnets.train import programs
    compile_apart, waited = programs._compiled_apart, []

    def compile_late(*args, **options):
        if hosts.index() == 1 and not waited:
            waited.append(time.sleep({seconds}))
        return compile_apart(*args, **options)

    programs._compiled_apart = compile_late
"""


@pytest.mark.long
@pytest.mark.timeout(800)
@pytest.mark.parametrize("name", ["jit", "fixed"])
def test_who_compiles_for_longer_is_waited_for(name):
    """Longer than Gloo waits in the first exchange of a program, 30 s."""
    script = LATE.format(seconds=45) + SCRIPT.format(cases={name: CASES[name]})
    ended = processes.run(script, 2, timeout=400)
    assert [("FOUND" in e.out, e.code) for e in ended] == [(True, 0)] * 2
