"""The processes of a run on several hosts: who is there, and what they tell one another.

Only small texts and barriers go this way, through the key-value service of JAX's coordinator: no device
takes part, so any thread may do it while devices compute. With one process everything here is trivial.
"""

import collections
import contextlib
import errno
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

from jax._src import (
    clusters,
    distributed,
    xla_bridge,
)  # the service's client has no public name; Orbax takes it from here too

from jaxnets import errors
from jaxnets.errors import first_line

TIMEOUT_S = 300.0
_QUIET_S = 5.0

_counters: dict[str, "itertools.count[int]"] = collections.defaultdict(itertools.count)
_lock = threading.Lock()


def count() -> int:
    """How many processes the run has."""
    return distributed.global_state.num_processes if is_joined() else 1


def index() -> int:
    """Which of them this is, from 0."""
    return distributed.global_state.process_id if is_joined() else 0


def is_first() -> bool:
    """Whether this is the process that writes logs and reports."""
    return index() == 0


def is_joined() -> bool:
    """Whether `jax.distributed` was initialised here."""
    return distributed.global_state.client is not None


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    heartbeat_s: float = 100.0,
) -> None:
    """Meet the other processes of the run; before JAX has looked for devices.

    Args:
        coordinator: HOST:PORT of process 0. With it the other two are needed; without any of the three
            the cluster is asked: Cloud TPU, SLURM, Open MPI, or Kubernetes.
        num_processes: of the run.
        process_id: of this one, from 0.
        timeout_s: how long to wait for the others.
        heartbeat_s: how long a process may be silent before the others take it for dead and end.

    Raises:
        ConfigError: if the three don't go together, no cluster is found, or not all processes come.
    """
    given = (coordinator, num_processes, process_id)
    if any(x is not None for x in given) and None in given:
        raise errors.ConfigError(
            "--coordinator, --num-processes and --process-id go together: give all three, or none where "
            "the cluster says them (Cloud TPU, SLURM, Open MPI, Kubernetes)"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise errors.ConfigError(
            f"process {process_id} of {num_processes}: processes count from 0 to {num_processes - 1}"
        )
    port = None if coordinator is None else coordinator.rpartition(":")[2]
    if port is not None and not (port.isdigit() and 1 <= int(port) <= 65535):
        raise errors.ConfigError(
            f"the coordinator is HOST:PORT, with a port up to 65535, not {coordinator}"
        )
    if coordinator is None and cluster_size() == 1:
        raise errors.ConfigError(
            "no cluster of several processes is found here (Cloud TPU, SLURM, Open MPI, Kubernetes): "
            "give --coordinator HOST:PORT, --num-processes and --process-id"
        )
    if xla_bridge.backends_are_initialized():
        raise errors.ConfigError(
            "JAX was used before the processes met: the experiment, or a plugin, makes arrays when "
            "it is imported; make them in a function"
        )
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    place = "the cluster's coordinator" if coordinator is None else f"the coordinator {coordinator}"

    def give_up() -> None:  # JAX's own limit ends the process by a signal, with a page of C++
        line = f"{who} waited {timeout_s:g} s at {place}, and not all of the others came"
        os.write(2, f"error: {line}\n".encode())
        os._exit(2)

    bind = _bind_address(coordinator, who) if coordinator is not None and process_id == 0 else None

    def tell() -> None:
        os.write(2, f"{who} waits at {place} for the others, {timeout_s:g} s at most\n".encode())

    timers = [threading.Timer(timeout_s, give_up), threading.Timer(_QUIET_S, tell)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        distributed.global_state.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=round(timeout_s) + 60,
            heartbeat_timeout_seconds=max(1, round(heartbeat_s)),
            coordinator_bind_address=bind,
            cluster_detection_method=None if coordinator is None else "deactivate",
        )
    except Exception as error:
        distributed.global_state.client = None
        raise errors.ConfigError(f"{who} could not join {place}: {first_line(error)}") from error
    finally:
        for timer in timers:
            timer.cancel()


def _bind_address(coordinator: str, who: str) -> str | None:
    """Where the first process listens: on that address alone, so that not everyone can join.

    On all addresses (None) where it is no address of this machine, as behind a service of Kubernetes.
    """
    host, _, port = coordinator.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise errors.ConfigError(
            f"{who} can't listen at the coordinator {coordinator}: {error.strerror or error}"
        ) from error
    return coordinator


def cluster_size() -> int:
    """How many processes the cluster that this one was started by has; 1 if there is none.

    Asked are those that JAX knows: Cloud TPU, SLURM (in a step of `srun`), Open MPI, and the indexed
    jobs of Kubernetes.
    """
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method or not kind.is_env_present():
            continue
        if kind.name == "k8s" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue  # any pod has Kubernetes' variables
        try:
            return int(kind.get_process_count())
        except Exception as error:
            raise errors.ConfigError(
                f"this looks like a cluster ({kind.name}), which doesn't say how many processes there "
                f"are ({first_line(error)}): give --coordinator, --num-processes and --process-id"
            ) from error
    return 1


def barrier(name: str, *, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until every process has come to this barrier; they must all come to the same ones.

    Args:
        name: of the barrier; the same name may be used again and again, by one thread at a time.
        timeout_s: how long.

    Raises:
        HostError: if not all come in that time.
    """
    if count() == 1:
        return
    try:
        client().wait_at_barrier(_numbered(f"barrier/{name}"), round(timeout_s * 1000))
    except Exception as error:
        raise _lost(
            f"not all {count()} processes came to {name!r} within {timeout_s:g} s", error
        ) from error


def gather(name: str, value: Any, *, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Every process's value, in their order, on every process.

    Args:
        name: of the exchange; it may be used again and again, in the same order on every process.
        value: what JSON can hold.
        timeout_s: how long to wait for the others.

    Raises:
        HostError: if not all give one in that time.
    """
    if count() == 1:
        return [json.loads(json.dumps(value))]
    key = _numbered(f"gather/{name}")
    service = client()
    prefix, _, number = key.rpartition("/")
    if is_first() and int(number) > 1:  # of the exchange before the last one everybody has read all
        for i in range(count()):
            with contextlib.suppress(Exception):
                service.key_value_delete(f"{prefix}/{int(number) - 2}/{i}")
    service.key_value_set(f"{key}/{index()}", json.dumps(value))
    found = []
    for i in range(count()):
        try:
            found.append(service.blocking_key_value_get(f"{key}/{i}", round(timeout_s * 1000)))
        except Exception as error:
            what = f"process {i} of {count()} said nothing of {name!r} within {timeout_s:g} s"
            raise _lost(what, error) from error
    return [json.loads(text) for text in found]


def broadcast(name: str, value: Any, *, timeout_s: float = TIMEOUT_S) -> Any:
    """The first process's value on every process; the value of the others isn't looked at.

    The first one doesn't wait for the others, which may come late: the last to read it deletes it.

    Args:
        name: of the exchange; it may be used again and again, in the same order on every process.
        value: what JSON can hold.
        timeout_s: how long to wait for the first process.

    Raises:
        HostError: if it gives none in that time.
    """
    if count() == 1:
        return json.loads(json.dumps(value))
    key, service = _numbered(f"broadcast/{name}"), client()
    if is_first():
        text = json.dumps(value)
        service.key_value_set(f"{key}/value", text)
        return json.loads(text)
    try:
        text = service.blocking_key_value_get(f"{key}/value", round(timeout_s * 1000))
    except Exception as error:
        raise _lost(
            f"the first process said nothing of {name!r} within {timeout_s:g} s", error
        ) from error
    with contextlib.suppress(Exception):
        if service.key_value_increment(f"{key}/readers", 1) == count() - 1:
            for part in ("value", "readers"):
                service.key_value_delete(f"{key}/{part}")
    return json.loads(text)


def agree(name: str, values: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S) -> None:
    """Make sure that all processes have the same values.

    Raises:
        ConfigError: on every process, naming what differs and on which.
    """
    everyone = gather(name, dict(values), timeout_s=timeout_s)
    first = everyone[0]
    for i, other in enumerate(everyone[1:], start=1):
        names = sorted(key for key in {**first, **other} if first.get(key) != other.get(key))
        if names:
            shown = ", ".join(
                f"{key} {_short(first.get(key))} -> {_short(other.get(key))}" for key in names[:5]
            )
            raise errors.ConfigError(
                f"process {i} differs from process 0 in its {name}: {shown}"
                f"{f', and {len(names) - 5} more' if len(names) > 5 else ''}; "
                "every host must run the same"
            )


def say(line: str) -> None:
    """Tell the user something that is not the result; of several processes the first one does."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def client() -> Any:
    """JAX's client of the coordinator; None with one process."""
    return distributed.global_state.client


def _numbered(name: str) -> str:
    with _lock:
        return f"jaxnets/{name}/{next(_counters[name])}"


def _lost(what: str, error: Exception) -> errors.HostError:
    return errors.HostError(f"{what}: {first_line(error)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
