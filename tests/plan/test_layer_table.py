"""The table against arithmetic by hand."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxnets import __main__ as main
from jaxnets import models, registry
from jaxnets.plan import format_table, layer_table
from jaxnets.train.flops import count_flops

ROOT = Path(__file__).parents[2]

# kind, output, parameters, FLOPs of one image
LENET = {
    "conv1": ("Conv", (28, 28, 6), 5 * 5 * 3 * 6 + 6, 2 * 28 * 28 * 6 * (5 * 5 * 3)),
    "conv2": ("Conv", (10, 10, 16), 5 * 5 * 6 * 16 + 16, 2 * 10 * 10 * 16 * (5 * 5 * 6)),
    "dense1": ("Linear", (120,), 400 * 120 + 120, 2 * 400 * 120),
    "dense2": ("Linear", (84,), 120 * 84 + 84, 2 * 120 * 84),
    "head": ("Linear", (10,), 84 * 10 + 10, 2 * 84 * 10),
}
CONVNET = {
    "conv1": ("Conv", (32, 32, 32), 9 * 3 * 32, 2 * 32 * 32 * 32 * (9 * 3)),
    "norm1": ("BatchNorm", (32, 32, 32), 2 * 32, 0),
    "conv2": ("Conv", (16, 16, 64), 9 * 32 * 64, 2 * 16 * 16 * 64 * (9 * 32)),
    "norm2": ("BatchNorm", (16, 16, 64), 2 * 64, 0),
    "conv3": ("Conv", (8, 8, 128), 9 * 64 * 128, 2 * 8 * 8 * 128 * (9 * 64)),
    "norm3": ("BatchNorm", (8, 8, 128), 2 * 128, 0),
    "dense1": ("Linear", (128,), 2048 * 128 + 128, 2 * 2048 * 128),
    "dropout1": ("Dropout", (128,), 0, 0),
    "head": ("Linear", (10,), 128 * 10 + 10, 2 * 128 * 10),
}


@pytest.mark.parametrize(("name", "expected"), [("lenet", LENET), ("convnet", CONVNET)])
@pytest.mark.parametrize("batch", [1, 4])
def test_by_hand(name, expected, batch):
    rows = layer_table(registry.get("model", name)(), (batch, 32, 32, 3))
    assert [row.path for row in rows] == list(expected)
    for row in rows:
        kind, output, num_params, flops = expected[row.path]
        assert (row.kind, row.output_shape) == (kind, (batch, *output))
        assert (row.num_params, row.flops) == (num_params, batch * flops)
        assert row.params_bytes == 4 * num_params
        assert row.output_bytes == 4 * batch * jnp.zeros(output).size
    assert sum(row.num_params for row in rows) == {"lenet": 62_006, "convnet": 357_034}[name]


@pytest.mark.parametrize(
    "name", [name for name in registry.names("model") if name not in ("resnet101", "resnet152")]
)
def test_nothing_is_left_out(name):
    """Layers together are the whole model, whose numbers come another way."""
    model, shape = registry.get("model", name)(), (2, 32, 32, 3)
    rows = layer_table(model, shape)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    sizes = [x.size for x in jax.tree.leaves(variables["params"])]
    assert sum(row.num_params for row in rows) == sum(sizes)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    whole = count_flops(lambda v, x: model.apply(v, x, train=False), variables, x)
    assert sum(row.flops for row in rows) == whole


@jax.jit
def product(a, b):
    return a @ b


class Mixer(nn.Module):
    """Its own parameter and product, a nested layer, one layer called twice, a compiled function."""

    @nn.compact
    def __call__(self, x, *, train=False):
        w = self.param("w", nn.initializers.ones, (6, 6))
        shared = Inner(name="shared")
        return product(shared(shared(x)), w)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="dense")(x)
        return product(x, self.param("v", nn.initializers.ones, (6, 6)))


def test_what_belongs_to_whom():
    rows = layer_table(Mixer(), (3, 6))
    each = 2 * 3 * 6 * 6
    assert [(row.path, row.num_params, row.flops) for row in rows] == [
        ("", 36, each),
        ("shared", 36, each),
        ("shared/dense", 42, each),
        ("shared", 0, each),  # called again: the same parameters
        ("shared/dense", 0, each),
    ]


def test_the_text_has_every_layer_and_the_totals():
    text = format_table(layer_table(models.lenet(), (1, 32, 32, 3)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[2] == "conv1 Conv 1 x 28 x 28 x 6 456 705,600 18.4 KiB 1.8 KiB"
    assert lines[-1] == "total 62,006 1,303,440 25.5 KiB 242.2 KiB"


def inspect(capsys, *words):
    status = main.main(["inspect", *words])
    return status, *capsys.readouterr()


def test_the_command(capsys):
    status, out, _ = inspect(
        capsys, "mlp", "--image-shape", "8,8,1", "--num-classes", "3", "--batch-size", "2"
    )
    assert status == 0
    assert "total" in out
    assert f"{64 * 256 + 256 + 256 * 128 + 128 + 128 * 3 + 3:,}" in out
    assert f"{2 * 2 * (64 * 256 + 256 * 128 + 128 * 3):,}" in out
    assert "for a batch of 2; FLOPs: forward, 2 for each multiply-add" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lanet"], "unknown model 'lanet': did you mean 'lenet'?"),
        ([], "see --help"),
        (["lenet", "--image-shape", "8,8"], "the image shape is height,width,channels"),
        (["lenet", "--image-shape", "8,8,0"], "the image shape is height,width,channels"),
        (
            ["lenet", "--image-shape", "8,8,3"],
            "lenet can't take images of (1, 8, 8, 3): a (5, 5) kernel",
        ),
        (["lenet", "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["lenet", "--plugin", "nowhere.py"], "the plugin nowhere.py does not exist"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, words, message):
    status, out, error = inspect(capsys, *words)
    assert (status, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_model_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from jaxnets import models, registry\n"
        "registry.register('model', 'mine', lambda **k: models.mlp(hidden=(8,), **k))\n"
    )
    command = [sys.executable, "-m", "jaxnets", "inspect", "mine", "--plugin", str(tmp_path / "mine.py")]
    done = subprocess.run(
        [*command, "--image-shape=2,2,1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(4 * 8 + 8 + 8 * 10 + 10) in done.stdout
