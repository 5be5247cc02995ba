import json
import socket
import subprocess
import sys
import textwrap

import processes
import pytest

from jaxnets import errors
from jaxnets.train import hosts


def test_one_process_is_alone():
    assert (hosts.count(), hosts.index(), hosts.is_first(), hosts.is_joined()) == (1, 0, True, False)
    hosts.barrier("here")
    hosts.agree("config", {"seed": 1})
    assert hosts.gather("x", (1, 2)) == [[1, 2]]
    assert hosts.broadcast("x", {"a": 1}) == {"a": 1}


def test_what_processes_tell_one_another():
    ended = processes.run(
        """
        import json
        from jaxnets import errors
        me = hosts.index()
        told = [hosts.gather("number", {"i": me}) for _ in range(3)][-1]
        first = [hosts.broadcast("word", f"of {me}") for _ in range(2)][-1]
        hosts.barrier("here"); hosts.barrier("here")
        hosts.agree("versions", {"jax": 1})
        try:
            hosts.agree("config", {"seed": me // 2, "epochs": 2, "model": "lenet" if me < 2 else "mlp"})
            refused = None
        except errors.ConfigError as error:
            refused = str(error)
        try:
            if me == 1:
                hosts.barrier("alone", timeout_s=0.5)
        except errors.HostError as error:
            print("alone:", error)
        print(json.dumps([hosts.count(), hosts.is_first(), told, first, refused]))
        """,
        3,
        devices=1,
    )
    for e in ended:
        count, is_first, told, first, refused = json.loads(e.out.splitlines()[-1])
        assert (count, is_first) == (3, e.index == 0)
        assert told == [{"i": 0}, {"i": 1}, {"i": 2}]
        assert first == "of 0"
        expected = (
            "process 2 differs from process 0 in its config: model 'lenet' -> 'mlp', seed 0 -> 1; "
        )
        assert refused.startswith(expected)
    assert "alone: not all 3 processes came to 'alone' within 0.5 s" in ended[1].out


def test_what_was_told_is_not_kept():
    """However often they speak; and nothing goes before the slowest has read it."""
    ended = processes.run(
        """
        import json, time
        me = hosts.index()
        for i in range(20):
            hosts.gather("number", i)
        first = []
        for i in range(20):
            if me == 2 and i in (0, 10):
                time.sleep(0.3)  # by then the others are far ahead
            first.append(hosts.broadcast("word", i if me == 0 else object))
        hosts.barrier("read")
        left = [key for key, _ in hosts.client().key_value_dir_get("jaxnets/")]
        hosts.barrier("counted")
        print(json.dumps([first, left]))
        """,
        3,
        devices=1,
    )
    for e in ended:
        first, left = json.loads(e.out.splitlines()[-1])
        assert first == list(range(20))
        # Of the gatherings the last two, three values each.
        assert len(left) == 6, left
        assert all("gather/number" in key for key in left)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1:99", 2, None), "go together"),
        ((None, None, 1), "go together"),
        (("10.0.0.1:99", 2, 2), "processes count from 0 to 1"),
        (("10.0.0.1", 2, 0), "the coordinator is HOST:PORT, with a port up to 65535, not 10.0.0.1"),
    ],
)
def test_processes_that_cannot_meet(arguments, message):
    with pytest.raises(errors.ConfigError, match=message):
        hosts.join(*arguments)


def join_apart(port, index, timeout_s):
    script = f"""
        from jaxnets import errors
        from jaxnets.train import hosts
        try:
            hosts.join("127.0.0.1:{port}", 2, {index}, timeout_s={timeout_s})
            print("met")
        except errors.ConfigError as error:
            print("refused:", error)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=60, check=False, cwd=processes.ROOT,
    )  # fmt: skip


def test_who_never_comes_is_not_waited_for_for_ever():
    """Without the first one, and without the second: one line that says where, and no page of C++."""
    for index in (1, 0):
        done = join_apart(processes._free_port(), index, 1.5)
        assert done.returncode == 2
        assert f"process {index} of 2 waited 1.5 s at the coordinator 127.0.0.1:" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = join_apart(taken.getsockname()[1], 0, 30)
    assert "refused: process 0 of 2 can't listen at the coordinator 127.0.0.1:" in done.stdout, (
        done.stderr
    )


def test_clusters_say_how_many_there_are(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert hosts.cluster_size() == 1  # a shell of an allocation is no step of it
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert hosts.cluster_size() == 4
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(errors.ConfigError, match=r"looks like a cluster \(slurm\)"):
        hosts.cluster_size()
