"""Operations against arithmetic by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxnets.layers.conv import conv2d
from jaxnets.train.flops import count_flops


def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products():
    assert count_flops(jnp.matmul, of(2, 3), of(3, 5)) == 2 * 2 * 3 * 5
    assert count_flops(lambda a, b: jnp.einsum("bik,bjk->bij", a, b), of(7, 2, 3), of(7, 5, 3)) == (
        2 * 7 * 2 * 5 * 3
    )
    assert count_flops(lambda a: jnp.exp(a) + a, of(100, 100)) == 0


@pytest.mark.parametrize(
    ("size", "strides", "padding", "channels", "features", "expected"),
    [
        ((8, 8), (1, 1), "VALID", 3, 5, 2 * 6 * 6 * 5 * (3 * 3 * 3)),
        ((8, 8), (1, 1), 1, 3, 5, 2 * 8 * 8 * 5 * (3 * 3 * 3)),
        ((9, 9), (2, 2), 1, 16, 4, 2 * 5 * 5 * 4 * (3 * 3 * 16)),
    ],
)
def test_convolutions(size, strides, padding, channels, features, expected):
    def fn(x, kernel):
        return conv2d(x, kernel, strides=strides, padding=padding)

    kernel = of(3, 3, channels, features)
    assert count_flops(fn, of(1, *size, channels), kernel) == expected
    assert count_flops(fn, of(4, *size, channels), kernel) == 4 * expected
    # The form that is fast on a CPU takes more; what was traced before must not be counted.
    jax.make_jaxpr(fn)(of(1, *size, channels), kernel)
    assert count_flops(fn, of(1, *size, channels), kernel) == expected


def test_groups_and_transposed_convolutions():
    def grouped(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", feature_group_count=4, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert count_flops(grouped, of(1, 6, 6, 8), of(3, 3, 2, 12)) == 2 * 36 * 12 * (3 * 3 * 2)

    def transposed(x, kernel):
        return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    # Every input pixel is multiplied with the whole kernel, whatever the output's size.
    assert count_flops(transposed, of(1, 4, 4, 3), of(2, 2, 3, 5)) == 2 * 16 * (2 * 2 * 3 * 5)


def test_what_is_inside_of_something_else():
    a = of(4, 4)
    once = 2 * 4 * 4 * 4
    assert count_flops(jax.jit(lambda a: a @ a), a) == once
    assert count_flops(jax.checkpoint(lambda a: a @ a), a) == once
    assert (
        count_flops(lambda a: lax.scan(lambda c, _: (c @ a, None), a, None, length=7)[0], a) == 7 * once
    )
    assert count_flops(lambda a: lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a), a) == 2 * once
    assert count_flops(lambda a: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ a, a), a) == once
    assert count_flops(jax.vmap(lambda a: a @ a), of(9, 4, 4)) == 9 * once

    @jax.custom_vjp
    def square(a):
        return a @ a

    square.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a.T + a.T @ g,))
    assert count_flops(square, a) == once
    assert count_flops(lambda a: jax.grad(lambda a: square(a).sum())(a), a) == 3 * once
