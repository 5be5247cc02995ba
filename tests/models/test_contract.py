"""What every registered model keeps to: one suite, a tiny variant of each.

A new model needs a row in `NUM_PARAMS`, and one in `SMALLEST` if it has a smallest image. Without
one in `TINY` it is tested as it is, which may be slow.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnets import losses, models, ops, registry

NAMES = registry.names("model")
# Deeper variants of a family: what they compute is tested on its tiny variants, once.
DEEPER = {"resnet34", "resnet101", "resnet152"}
every_name = pytest.mark.parametrize("name", NAMES)
every_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name == "resnet50" else name
        for name in NAMES
        if name not in DEEPER
    ],
)
V, B = 5, 16  # classes, rows: two for each of eight devices
QUICK = {"xla_backend_optimization_level": 0}

TINY = {  # fields, and the shape of an image
    "lenet": ({}, (16, 17, 3)),
    "convnet": ({"features": (4, 6), "hidden": 8}, (5, 7, 3)),
    "mlp": ({"hidden": (12, 8)}, (4, 3, 3)),
    "resnet18": ({"stages": (1, 1), "width": 4}, (5, 6, 3)),
    "resnet50": ({"stages": (1, 1), "width": 4, "small_images": False}, (15, 14, 3)),
    "speednet": ({"widths": (4, 6)}, (6, 7, 1)),
}
NUM_PARAMS = {  # 32x32x3, 10 classes
    "lenet": 62_006,
    "convnet": 357_034,
    "mlp": 820_874,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet101": 42_512_970,
    "resnet152": 58_156_618,
    "speednet": 1_971_640,
}
SMALLEST = {
    "lenet": 16,
    "convnet": 8,
    "speednet": 9,
}  # pixels a side, where less would leave an empty output


def tiny(name, **fields):
    """The tiny variant as two functions, and the shape of its images."""
    options, shape = TINY.get(name, ({}, (32, 32, 3)))
    model = registry.get("model", name)(num_classes=V, **options, **fields)
    return *models.functional(model, jax.ShapeDtypeStruct((1, *shape), jnp.float32)), shape


@cache
def start(name):
    """Parameters and model state in float32, drawn by NumPy: compiling the real start takes longer."""
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        last = path[-1].key
        if last == "var":
            return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        size = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        values = rng.normal(size=leaf.shape) / np.sqrt(size) + (last == "scale")
        return values.astype(np.float32)

    shapes = jax.eval_shape(tiny(name)[0], jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), tree)


def batch_of(name, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.normal(size=(B, *tiny(name)[2])).astype(dtype)),
        "label": jnp.asarray(rng.integers(0, V, B)),
        "index": jnp.asarray(rng.permutation(1000)[:B]),
        "mask": jnp.asarray(rng.random(B) < 0.8),
    }


def forward(name, params, model_state, batch, **fields):
    """Training's output and the new model state."""
    _, apply_fn, _ = tiny(name, **fields)
    return apply_fn(
        params,
        model_state,
        batch["image"],
        train=True,
        key=jax.random.key(1),
        rows=batch["index"],
        mask=batch["mask"],
    )


def train(name, params, model_state, batch, axis_name=None):
    """Sums and gradients over the global batch, the new model state, and this part's output."""

    def loss_fn(params):
        logits, changed = forward(name, params, model_state, batch)
        loss = losses.softmax_cross_entropy(logits, batch["label"])
        return jnp.where(batch["mask"], loss, 0).sum(), (changed, logits)

    with ops.data_axis(axis_name):
        (loss, (changed, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (*ops.data_sum((loss, grads)), changed, logits)


@cache
def step_of(name):
    """`train`, compiled once for all tests, and a list that grows with every trace.

    Without LLVM's optimisations, which take most of the time and change no more than rounding.
    """
    traces = []

    def step(params, model_state, batch):
        traces.append(None)
        return train(name, params, model_state, batch)

    return jax.jit(step, compiler_options=QUICK), traces


def assert_close(left, right, **tolerance):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@every_model
def test_outputs_gradients_and_the_number_of_traces(name):
    params, model_state = cast(start(name), np.float32)
    step, traces = step_of(name)
    _, grads, changed, logits = step(params, model_state, batch_of(name))
    assert logits.shape == (B, V)
    assert logits.dtype == jnp.float32
    for leaf in jax.tree.leaves((grads, changed, logits)):
        assert np.isfinite(leaf).all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(np.asarray(leaf) != 0), f"{jax.tree_util.keystr(path)} learns nothing"
    before, after = (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
        for tree in ((params, model_state), (grads, changed))
    )
    assert after == before
    num_traces = len(traces)
    batch = jax.tree.map(lambda x: x[::-1], batch_of(name))
    step(jax.tree.map(jnp.subtract, params, grads), changed, batch)
    assert len(traces) == num_traces, "what a step gives back has it traced anew"


@every_model
def test_jit_equals_eager(name):
    params, model_state = start(name)
    batch = batch_of(name)
    eager = forward(name, params, model_state, batch)
    compiled = jax.jit(partial(forward, name))(params, model_state, batch)
    # Fusion rounds otherwise, and a batch normalisation carries that to every element.
    assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_eight_devices_equal_one(name, strategy, x64):
    params, model_state = cast(start(name), np.float64)
    batch = batch_of(name, np.float64)
    step, _ = step_of(name)
    expected = step(params, model_state, batch)
    assert expected[3].dtype == jnp.float64
    if strategy == "jit":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        result = step(params, model_state, spread)
        assert len(result[3].sharding.device_set) == 8
    else:
        mapped = jax.pmap(
            partial(train, name, axis_name="data"),
            axis_name="data",
            in_axes=(None, None, 0),
            out_axes=(None, None, None, 0),
        )
        parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
        # pmap takes no compiler options; a jit around it does.
        *sums, logits = jax.jit(mapped, compiler_options=QUICK)(params, model_state, parts)
        result = (*sums, logits.reshape(B, V))
    assert_close(result, expected, rtol=1e-12, atol=1e-12)


@every_model
def test_evaluation_of_a_row_does_not_depend_on_the_others(name):
    params, model_state = start(name)
    _, apply_fn, _ = tiny(name)
    image = batch_of(name)["image"]
    apply = partial(apply_fn, params, model_state, train=False)
    evaluate = jax.jit(lambda image: apply(image)[0], compiler_options=QUICK)
    logits = np.asarray(evaluate(image))
    assert logits.shape == (B, V)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(evaluate(image), logits)
    for poison in (np.nan, 1e30):
        others = np.full_like(image, poison)
        others[3] = image[3]
        np.testing.assert_array_equal(evaluate(others)[3], logits[3])
    # Another shape is another program, and may add in another order.
    np.testing.assert_allclose(evaluate(image[3:4])[0], logits[3], rtol=1e-4, atol=1e-5)


@every_model
def test_padding_changes_nothing_else(name):
    params, model_state = start(name)
    batch = batch_of(name)
    step, _ = step_of(name)
    mask = np.asarray(batch["mask"])
    assert 0 < mask.sum() < B

    def padded(value):
        image = np.array(batch["image"])
        image[~mask] = value
        loss, grads, changed, logits = step(params, model_state, {**batch, "image": image})
        return changed, logits[mask], loss, grads

    expected = padded(0.5)
    for value, is_finite in ((1e4, True), (1e30, False), (np.nan, False)):
        # Gradients hold 0 times the padding, which is 0 only for finite numbers.
        result = padded(value) if is_finite else padded(value)[:3]
        leaves = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=False)
        for leaf, reference in leaves:
            np.testing.assert_array_equal(leaf, reference)


@every_model
def test_training_follows_the_rows_wherever_they_are(name, x64):
    params, model_state = cast(start(name), np.float64)
    batch = batch_of(name, np.float64)
    step, _ = step_of(name)
    order = np.random.default_rng(1).permutation(B)
    *expected, logits = step(params, model_state, batch)
    *result, moved = step(params, model_state, jax.tree.map(lambda x: x[order], batch))
    assert_close((result, moved), (expected, logits[order]), rtol=1e-12, atol=1e-12)


@every_model
def test_the_compute_dtype_is_not_that_of_the_parameters(name):
    init_fn, apply_fn, shape = tiny(name, dtype=jnp.bfloat16)
    params, model_state = jax.eval_shape(init_fn, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, model_state))} == {np.dtype("float32")}
    image = jax.ShapeDtypeStruct((B, *shape), jnp.float32)

    def apply(params, model_state, image, train):
        key = jax.random.key(0)
        return apply_fn(params, model_state, image, train=train, key=key)

    for is_training in (True, False):
        logits, changed = jax.eval_shape(partial(apply, train=is_training), params, model_state, image)
        assert logits.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(changed)} <= {np.dtype("float32")}
    values = cast(start(name), np.float32)
    image = batch_of(name)["image"]
    rounded, exact = (
        jax.jit(lambda image, fn=fn: fn(*values, image, train=False)[0], compiler_options=QUICK)(image)
        for fn in (apply_fn, tiny(name)[1])
    )
    np.testing.assert_allclose(rounded.astype(np.float32), exact, atol=0.05 * np.abs(exact).max())


@every_name
def test_the_number_of_parameters(name):
    model = registry.get("model", name)()
    init_fn, _ = models.functional(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    params, _ = jax.eval_shape(init_fn, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == NUM_PARAMS[name]


def output_of(name, shape, num_classes=10, rows=2):
    """Shape of the output for a shape of images, with nothing computed."""
    model = registry.get("model", name)(num_classes=num_classes)
    example = jax.ShapeDtypeStruct((rows, *shape), jnp.float32)
    init_fn, apply_fn = models.functional(model, example)
    variables = jax.eval_shape(init_fn, jax.random.key(0))
    logits, _ = jax.eval_shape(partial(apply_fn, train=False), *variables, example)
    return logits.shape


@every_model
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (33, 47, 4), (64, 32, 1)])
@pytest.mark.parametrize("num_classes", [1, 2, 100])
def test_any_image_and_number_of_classes(name, shape, num_classes):
    assert output_of(name, shape, num_classes) == (2, num_classes)
    assert output_of(name, shape, num_classes, rows=1) == (1, num_classes)


@every_name
def test_images_that_would_leave_an_empty_output_are_refused(name):
    side = SMALLEST.get(name, 1)
    assert output_of(name, (side, side, 3)) == (2, 10)
    for shape in [(side - 1, side, 3), (side, side - 1, 3)] if side > 1 else []:
        with pytest.raises(ValueError, match="leaves nothing of an image"):
            output_of(name, shape)
