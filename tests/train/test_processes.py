import signal

import processes
import pytest


def test_they_join_and_none_outlives_the_test():
    ended = processes.run(
        """
        import jax
        print(hosts.index(), hosts.count(), jax.local_device_count(), jax.device_count())
        print(hosts.gather("x", hosts.index() * 10))
        """
    )
    assert [e.out.split("\n")[:2] for e in ended] == [[f"{i} 2 2 4", "[0, 10]"] for i in range(2)]
    with processes.Processes("import time; print('up'); time.sleep(600)", 1, joined=False) as started:
        started.wait_for(0, "up")
        with pytest.raises(AssertionError, match="did not end within"):
            started.wait(0.1)
    assert started.processes[0].returncode == -signal.SIGKILL
    with processes.Processes("import time; time.sleep(600)", 1, joined=False) as started:
        pass
    assert started.processes[0].returncode == -signal.SIGKILL
    with pytest.raises(AssertionError, match=r"ended with 3: .*oops"):
        processes.run("sys.stderr.write('oops'); sys.exit(3)", 1, joined=False)
