"""Which form of an operation is traced: the fast one for the platform at hand, or the plain one.

Both compute the same to rounding. The choice is made while a function is traced, so a function that
`jax.jit` has compiled already keeps its form.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """While this is open, operations are traced as `jax.lax` offers them, for any platform.

    A strategy that compiles a step then leaves XLA's options as they are, too, and the step stays plain.

    Use it to compile for another platform than JAX's default one, to export, and as the reference
    when a fast form is tested.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Whether `plain` is open."""
    return _plain.get()


def is_for_cpu() -> bool:
    """Whether to trace the form that is fast on a CPU."""
    return not is_plain() and jax.default_backend() == "cpu"
