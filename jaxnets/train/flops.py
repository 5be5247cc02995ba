"""Floating-point operations of a function, counted in what JAX traces; nothing is compiled or run.

Counted are matrix products and convolutions, two operations for each multiply-add, as is usual for a
model's FLOPs. What is elementwise (activations, normalisation, the optimizer) is small beside them and
bound by memory. Zeros at an image's border count. XLA's own cost analysis would need a compilation, and
counts the program that it made rather than the model.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxnets.ops.forms import plain


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """The operations of one call, in the plain form of every operation.

    Args:
        fn: any function that JAX can trace.
        args: arrays, or `jax.ShapeDtypeStruct`s of them.
        kwargs: the same.

    Returns:
        the number. Of a `cond` the dearest branch counts, of a `while` loop, whose length isn't known
        before, one round.

    Example:
        >>> a, b = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((3, 5), "float32")
        >>> count_flops(lambda a, b: a @ b, a, b)
        60
    """
    with plain():
        # A new function each time: one that was traced before, in its fast form, would be remembered.
        jaxpr = jax.make_jaxpr(lambda *args, **kwargs: fn(*args, **kwargs))(*args, **kwargs)
    return sum(flops for _, flops in products(jaxpr.jaxpr))


def products(jaxpr: Any, scope: str = "") -> Iterator[tuple[str, int]]:
    """Every matrix product and convolution of a jaxpr.

    Args:
        jaxpr: what `jax.make_jaxpr` gave, without its constants.
        scope: the name scopes around it.

    Returns:
        pairs of the name scopes in which one was traced, outermost first, and its operations.
    """
    for eqn in jaxpr.eqns:
        inner = f"{scope}/{eqn.source_info.name_stack}"
        name, parts = eqn.primitive.name, _inner_jaxprs(eqn.params)
        if name == "dot_general":
            yield inner, _dot_flops(eqn)
        elif name == "conv_general_dilated":
            yield inner, _conv_flops(eqn)
        elif name == "cond":
            branches = [list(products(part, inner)) for part in parts]
            yield from max(branches, key=lambda branch: sum(flops for _, flops in branch))
        else:
            rounds = eqn.params["length"] if name == "scan" else 1
            for part in parts:
                yield from ((where, rounds * flops) for where, flops in products(part, inner))


def primitives(jaxpr: Any) -> Iterator[str]:
    """The names of all primitives of a jaxpr, those of its inner ones too."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for part in _inner_jaxprs(eqn.params):
            yield from primitives(part)


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv_flops(eqn: Any) -> int:
    # The kernel's input axis has the channels of one group already.
    kernel, axes = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    depth = math.prod(kernel) // kernel[axes[0]]
    dilation = math.prod(eqn.params["lhs_dilation"])  # zeros between the pixels aren't multiplied
    return 2 * math.prod(eqn.outvars[0].aval.shape) * depth // dilation


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found
