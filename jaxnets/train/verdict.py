"""One process decides, all do the same: what steers a run of several processes must not differ in them.

Files may show later on one host than on another, and a disk may fail on one alone. So one process looks,
and the others take its word, errors included.
"""

from collections.abc import Callable
from typing import TypeVar

from jaxnets import errors
from jaxnets.train import hosts

T = TypeVar("T")


def by_first(name: str, decide: Callable[[], T], *, timeout_s: float = hosts.TIMEOUT_S) -> T:
    """What `decide` returns on the first process, on every process; it is called there alone.

    Args:
        name: of the decision; it may be used again and again, in the same order on every process.
        decide: returns what JSON can hold. What it raises there is raised on all, as the same line.
        timeout_s: how long the others wait.
    """
    if hosts.count() == 1:
        return decide()
    outcome, caught = None, None
    if hosts.is_first():
        try:
            outcome = {"value": decide()}
        except Exception as error:
            caught = error
            is_ours = isinstance(error, errors.UserError)
            kind = type(error).__name__ if is_ours else errors.HostError.__name__
            outcome = {"kind": kind, "line": str(error) if is_ours else f"process 0: {error}"}
    outcome = hosts.broadcast(name, outcome, timeout_s=timeout_s)
    if caught is not None:
        raise caught
    if "kind" in outcome:
        raise getattr(errors, outcome["kind"], errors.HostError)(outcome["line"])
    return outcome["value"]


def together(name: str, work: Callable[[], T], *, timeout_s: float = hosts.TIMEOUT_S) -> list[T]:
    """What `work` returns on each process, in their order; if it raises on one, all raise the same.

    Args:
        name: of the work; it may be used again and again, in the same order on every process.
        work: returns what JSON can hold.
        timeout_s: how long to wait for the others.
    """
    if hosts.count() == 1:
        return [work()]
    outcome, caught = None, None
    try:
        outcome = {"value": work()}
    except Exception as error:
        caught = error
        is_ours = isinstance(error, errors.UserError)
        kind = type(error).__name__ if is_ours else errors.HostError.__name__
        waited = any(isinstance(x, TimeoutError) for x in (error, error.__cause__))
        outcome = {"kind": kind, "line": str(error), "waited": waited}
    everyone = hosts.gather(name, outcome, timeout_s=timeout_s)
    failed = [(i, other) for i, other in enumerate(everyone) if "kind" in other]
    if failed:
        # One that only waited in vain, for another that failed, doesn't know the cause.
        i, first = min(failed, key=lambda found: found[1]["waited"])
        raise getattr(errors, first["kind"], errors.HostError)(
            f"process {i}: {first['line']}"
        ) from caught
    return [other["value"] for other in everyone]
