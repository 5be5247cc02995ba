"""Saved by any number of processes, gone on with by any other."""

import itertools
import json

import numpy as np
import processes
import pytest

SCRIPT = """
    import hashlib, json
    import jax, numpy as np
    import test_resume_matrix as matrix
    options = {options!r}
    seen, state = matrix.leg({folder!r}, {until}, **options)
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    bits = hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest()
    size = float(sum(np.abs(x.astype(np.float64)).sum() for x in leaves))
    print("FOUND " + json.dumps([seen, bits, size, int(state[-2])]))
"""
DEVICES = 4  # of all processes together


def leg(folder, until, num_processes, options):
    script = SCRIPT.format(options=options, folder=str(folder), until=until)
    ended = processes.run(
        script, num_processes, devices=DEVICES // num_processes, joined=num_processes > 1, timeout=200
    )
    found = [json.loads(line[6:]) for e in ended for line in e.out.splitlines() if line[:6] == "FOUND "]
    assert len(found) == num_processes
    assert all(each == found[0] for each in found)
    return found[0]


def check(tmp_path, first, then, options, others=None):
    """Three legs, of which the one between may have other options."""
    whole = leg(tmp_path / "whole", 12, 1, options)
    seen = []
    between = options if others is None else others
    for until, num_processes, here in ((4, first, options), (9, then, between), (12, first, options)):
        found, bits, size, step = leg(tmp_path / "c", until, num_processes, here)
        seen += found
    assert (seen, step) == (whole[0], 12)
    assert size == pytest.approx(whole[2], rel=1e-5)
    assert np.isfinite(size)
    if "virtual_shards" in options:
        assert bits == whole[1]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_two_processes_then_one(tmp_path):
    check(tmp_path, 2, 1, {"virtual_shards": 8})


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("first", "then"), list(itertools.product((1, 2, 4), (1, 2, 4))))
@pytest.mark.parametrize("options", [{}, {"virtual_shards": 8}], ids=["jit", "fixed order"])
def test_processes(tmp_path, first, then, options):
    check(tmp_path, first, then, options)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("then", "strategy"), [(1, "jit"), (1, "pmap"), (2, "fsdp"), (4, "pmap")])
def test_pmap_and_others(tmp_path, then, strategy):
    check(tmp_path, 2, then, {"strategy": "pmap"}, {"strategy": strategy})
