import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxnets.layers import Conv, conv2d

# (H, W), (height, width), strides, padding
CASES = [
    ((5, 6), (3, 3), (1, 1), "VALID"),
    ((7, 6), (3, 2), (2, 3), "VALID"),
    ((5, 6), (3, 3), (1, 1), "SAME"),
    ((7, 6), (2, 3), (2, 2), "SAME"),
    ((6, 6), (3, 3), (2, 2), "SAME"),  # one pixel of padding, which belongs below and to the right
    ((5, 4), (3, 3), (1, 1), 1),
    ((1, 1), (3, 3), (1, 1), 1),
    ((8, 7), (3, 3), (2, 2), 1),
    ((4, 5), (3, 2), (1, 2), ((2, 0), (0, 1))),
    ((4, 5), (1, 1), (2, 2), 0),
]
# The same, with dilation and groups
WIDER = [
    ((7, 6), (3, 2), (1, 1), "VALID", (2, 3), 1),
    ((7, 6), (3, 3), (1, 1), "SAME", (2, 2), 1),
    ((7, 6), (3, 3), (2, 1), 2, (2, 1), 2),
    ((5, 6), (3, 3), (1, 1), 1, (1, 1), 4),
    ((5, 6), (3, 3), (2, 2), "SAME", (1, 1), 4),
    ((5, 6), (1, 1), (1, 1), 0, (1, 1), 2),
]


def pads_of(size, kernel, strides, padding):
    if padding == "VALID":
        return [(0, 0), (0, 0)]
    if isinstance(padding, int):
        return [(padding, padding)] * 2
    if padding != "SAME":
        return padding
    pads = []
    for n, k, s in zip(size, kernel, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def by_hand(x, kernel, strides, padding):
    height, width = kernel.shape[:2]
    pads = pads_of(x.shape[1:3], kernel.shape[:2], strides, padding)
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    rows = (x.shape[1] - height) // strides[0] + 1
    columns = (x.shape[2] - width) // strides[1] + 1
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * strides[0], j * strides[1]
            part = x[:, top : top + height, left : left + width]
            out[:, i, j] = np.einsum("bhwc,hwcf->bf", part, kernel)
    return out


def arrays(size, kernel):
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, *size, 3)), rng.normal(size=(*kernel, 3, 4))


@pytest.mark.parametrize(("size", "kernel_size", "strides", "padding"), CASES)
def test_values_equal_a_loop(size, kernel_size, strides, padding, x64):
    x, kernel = arrays(size, kernel_size)
    out = conv2d(jnp.asarray(x), jnp.asarray(kernel), strides=strides, padding=padding)
    expected = by_hand(x, kernel, strides, padding)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "kernel_size", "strides", "padding", "dilation", "groups"), WIDER)
def test_dilation_and_groups_equal_pytorchs_meaning(
    size, kernel_size, strides, padding, dilation, groups, x64
):
    """A dilated kernel is one with zeros between; a group sees its own channels alone."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *size, 4)), rng.normal(size=(*kernel_size, 4 // groups, 8))
    found = conv2d(
        jnp.asarray(x),
        jnp.asarray(kernel),
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    spread = np.zeros((*reach, *kernel.shape[2:]))
    spread[:: dilation[0], :: dilation[1]] = kernel
    parts = [
        by_hand(part, own, strides, padding)
        for part, own in zip(np.split(x, groups, axis=3), np.split(spread, groups, axis=3), strict=True)
    ]
    np.testing.assert_allclose(found, np.concatenate(parts, axis=3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, r"takes \[B, H, W, C\] and \[height, width, C / 3, features\]"),
        ({"groups": 0}, "at least 1, not"),
        ({"dilation": (0, 1)}, "at least 1, not"),
        ({"strides": (1, 0)}, "at least 1, not"),
        ({"dilation": (3, 1)}, r"a \(7, 3\) kernel leaves nothing"),
        ({"padding": -1}, "padding is at least 0, not -1"),
        ({"padding": ((0, 1), (-1, 0))}, "padding is at least 0"),
    ],
)
def test_steps_and_groups_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv2d(jnp.zeros((1, 5, 5, 4)), jnp.zeros((3, 3, 4, 4)), **arguments)
    with pytest.raises(ValueError, match="5 features don't split into 2 groups"):
        conv2d(jnp.zeros((1, 5, 5, 4)), jnp.zeros((3, 3, 2, 5)), groups=2)
    with pytest.raises(ValueError, match="4 channels don't split into 3 groups"):
        jax.eval_shape(Conv(3, (1, 1), groups=3).init, jax.random.key(0), jnp.zeros((1, 5, 5, 4)))


@pytest.mark.parametrize("case", [0, 3, 8])
def test_gradients_equal_finite_differences(case, x64):
    size, kernel_size, strides, padding = CASES[case]
    x, kernel = arrays(size, kernel_size)
    fun = jax.jit(lambda x, k: (conv2d(x, k, strides=strides, padding=padding) ** 2).sum())
    check_grads(fun, (jnp.asarray(x), jnp.asarray(kernel)), order=1, atol=1e-5, rtol=1e-5)


def test_it_is_a_correlation_not_a_convolution():
    x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    kernel = jnp.array([1.0, 10.0]).reshape(1, 2, 1, 1)
    assert conv2d(x, kernel).ravel().tolist() == [21, 32]


@pytest.mark.parametrize(
    ("size", "kernel_size", "padding"),
    [
        ((2, 5), (3, 3), "VALID"),
        ((5, 2), (3, 3), "VALID"),
        ((1, 1), (4, 4), 1),
        ((0, 4), (1, 1), 0),
    ],
)
def test_an_empty_output_is_refused(size, kernel_size, padding):
    x, kernel = jnp.zeros((1, *size, 1)), jnp.zeros((*kernel_size, 1, 1))
    with pytest.raises(ValueError, match="leaves nothing of an image of shape"):
        conv2d(x, kernel, padding=padding)
    with pytest.raises(ValueError, match="leaves nothing of an image of shape"):
        jax.eval_shape(Conv(1, kernel_size, padding=padding).init, jax.random.key(0), x)


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        ((1, 4, 4, 3), (3, 3, 2, 1)),
        ((1, 4, 4, 3), (3, 3, 3)),
        ((4, 4, 3), (3, 3, 3, 1)),
        ((1, 4, 4, 1), (3, 3, 3, 1)),
    ],
)
def test_wrong_channels_and_ranks_are_refused(x, kernel):
    with pytest.raises(ValueError, match="takes"):
        conv2d(jnp.zeros(x), jnp.zeros(kernel))


@pytest.mark.parametrize("padding", ["same", "FULL", ""])
def test_an_unknown_padding_is_refused(padding):
    with pytest.raises(ValueError, match="padding is 'VALID', 'SAME' or pixels"):
        conv2d(jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1)), padding=padding)


def initialised(layer, x):
    """Output and variables, compiled in one piece."""
    return jax.jit(layer.init_with_output)(jax.random.key(0), x)


def test_a_depthwise_layer():
    layer = Conv(6, (3, 3), padding=1, groups=3, dilation=(1, 2))
    x = jnp.asarray(arrays((5, 6), (3, 3))[0], jnp.float32)
    out, variables = initialised(layer, x)
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (3, 3, 1, 6)
    expected = conv2d(x, kernel, padding=1, groups=3, dilation=(1, 2))
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_layer_is_the_function_and_a_bias(use_bias):
    layer = Conv(4, (3, 2), (1, 2), 1, use_bias=use_bias)
    x = jnp.asarray(arrays((5, 6), (3, 2))[0], jnp.float32)
    out, variables = initialised(layer, x)
    params = variables["params"]
    assert set(params) == ({"kernel", "bias"} if use_bias else {"kernel"})
    assert params["kernel"].shape == (3, 2, 3, 4)
    expected = conv2d(x, params["kernel"], strides=(1, 2), padding=1)
    np.testing.assert_allclose(out, expected, atol=1e-6)  # a bias begins at 0
    if use_bias:
        bias = jnp.arange(4.0)
        out = layer.apply({"params": {**params, "bias": bias}}, x)
        np.testing.assert_allclose(out - expected, np.broadcast_to(bias, out.shape), atol=1e-5)


def test_the_kernel_begins_with_variance_one_over_fan_in():
    _, variables = initialised(Conv(256, (5, 5)), jnp.zeros((1, 5, 5, 16)))
    kernel = variables["params"]["kernel"]
    assert abs(float(kernel.mean())) < 5 / np.sqrt(400 * kernel.size)
    np.testing.assert_allclose(float(kernel.var()) * 400, 1, rtol=0.02)


def test_the_dtype_is_of_the_computation_alone():
    x = jnp.ones((1, 4, 4, 2))
    out, variables = initialised(Conv(3, (3, 3), dtype=jnp.bfloat16), x)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    mixed = jax.eval_shape(Conv(3, (3, 3)).apply, variables, x.astype(jnp.bfloat16))
    assert mixed.dtype == jnp.float32


def test_an_empty_batch_stays_empty():
    assert conv2d(jnp.zeros((0, 4, 4, 1)), jnp.zeros((3, 3, 1, 2))).shape == (0, 2, 2, 2)
