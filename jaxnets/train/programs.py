"""How a step becomes a program: compiler options, jaxlib's defects avoided, several steps in a call."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version
import numpy as np

from jaxnets import defects
from jaxnets.ops import onednn
from jaxnets.train import hosts, program_cache
from jaxnets.train.flops import primitives
from jaxnets.typing import PyTree

# On a CPU XLA hands float32 convolutions to YNNPACK, whose gradients are slow: SpeedNet's step takes 2.4
# times as long with it. Products and reductions stay there. Of the other platforms nothing is changed.
CPU_OPTIONS = {defects.YNN_OPTION: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
# For a program in which jaxlib's own defects would show: reductions are where those known are.
CAREFUL_CPU_OPTIONS = {defects.YNN_OPTION: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
_LONGEST_S = 3600.0  # that one process may compile for while the others wait


def in_a_row(step: Callable, state: PyTree, draws: PyTree, num_devices: int) -> tuple[PyTree, Any]:
    """A step for each draw of a stack, one after the other."""
    unroll = 1
    if jax.default_backend() == "cpu":
        # XLA runs a convolution of its own in a loop on a CPU up to 100 times slower than outside of it.
        first = jax.tree.map(lambda x: x[0], draws)
        jaxpr = jax.make_jaxpr(step)(state, first).jaxpr
        slow = {"conv_general_dilated"} | ({onednn.NAME} if num_devices > 1 else set())
        has_convolution = not slow.isdisjoint(primitives(jaxpr))
        unroll = len(jax.tree.leaves(draws)[0]) if has_convolution else 1
    return jax.lax.scan(step, state, draws, unroll=unroll)


def _compiled_apart(program: Any, *args: PyTree, is_whole: bool) -> Any:
    """Compile a program where the next call finds it in JAX's memory.

    One that the cache of programs could not keep is compiled with the cache closed. Such a one isn't cut
    into parts for several devices by XLA.
    """
    trace = getattr(program, "trace", None)  # which what pmap returns hasn't
    traced: Any = trace(*args) if trace else jax.make_jaxpr(program)(*args)
    is_unkept = is_whole and onednn.NAME in primitives(traced.jaxpr)
    with program_cache.closed() if is_unkept else contextlib.nullcontext():
        lowered = traced.lower() if trace else program.lower(*args)
        return lowered.compile()


def chosen(
    fast: Any, careful: Any | None, *, is_whole: bool = True, is_shared: bool = False
) -> Callable:
    """Take the careful program of two where the fast one has a fusion that jaxlib computes wrongly.

    Args:
        fast: compiled by `jax.jit`.
        careful: the same; None if there is nothing to look for.
        is_whole: whether XLA doesn't cut it into parts for several devices.
        is_shared: whether it is of several processes, which then wait for all to have compiled it.
    """
    programs: dict[tuple, Any] = {}

    def run(*args: PyTree):
        shapes = _shapes(args[-1])
        if shapes not in programs:
            compiled = _compiled_apart(fast, *args, is_whole=is_whole)
            programs[shapes] = fast
            text = compiled.as_text() if careful else ""
            if careful and (not text or defects.faulty_fusions(text, jaxlib.version.__version__)):
                _compiled_apart(careful, *args, is_whole=is_whole)
                programs[shapes] = careful
            if is_shared:
                _meet()
        return programs[shapes](*args)

    return run


def meeting(program: Callable) -> Callable:
    """A program of several processes that wait for one another before it is called with new shapes."""
    known: set[tuple] = set()

    def run(*args: PyTree):
        shapes = _shapes(args[-1])
        if shapes not in known:
            _meet()
            known.add(shapes)
        return program(*args)

    return run


def _meet() -> None:
    """Wait until all processes have come here from compiling, which may take some much longer.

    In the first exchange of a program they are waited for on a CPU by Gloo, for 30 s.
    """
    hosts.barrier("programs/compiled", timeout_s=_LONGEST_S)


def _shapes(args: PyTree) -> tuple:
    return tuple((np.shape(x), getattr(x, "dtype", None)) for x in jax.tree.leaves(args))
