"""Known defects of jaxlib: the table agrees with the release that is here, and training keeps clear."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import optax
import pytest

from experiments import cifar10
from jaxnets import cli, data, defects, errors, losses, models, ops, registry, runner, train
from jaxnets.__main__ import main
from jaxnets.train import augment, programs

ROOT = Path(__file__).parents[1]
VERSION = jaxlib.version.__version__
CHECKED = [defect for defect in defects.DEFECTS if defect.check]
IDS = [defect.name for defect in CHECKED]


def by_default(fn, *arrays):
    return jax.jit(fn)(*arrays)


def as_in_training(strategy):
    def run(fn, *arrays):
        def make_step(axis_name):
            return lambda state, batch: fn(*state)

        return strategy.compile_eval(make_step)(arrays, {"mask": np.ones(1)})

    return run


@pytest.mark.parametrize("defect", CHECKED, ids=IDS)
def test_the_table_agrees_with_this_jaxlib(defect, record_property):
    is_here = defects.find(defect, by_default)
    is_listed = defect.is_known(VERSION, "cpu")
    assert is_listed or not is_here, f"jaxlib {VERSION} has {defect.name}: list it in jaxnets/defects.py"
    if is_listed and not is_here:
        figure = f"jaxlib {VERSION} is listed with {defect.name}, which doesn't show on this machine"
        record_property("figure", figure)


@pytest.mark.parametrize("defect", CHECKED, ids=IDS)
def test_a_check_tells_right_from_wrong(defect, monkeypatch):
    # Operation by operation, on one device, no defect shows.
    one = partial(jax.make_mesh, (1,), ("x",), devices=jax.devices()[:1])
    monkeypatch.setattr(jax, "make_mesh", lambda *_, axis_types, devices: one(axis_types=axis_types))

    def eagerly(fn, *arrays):
        with jax.disable_jit():
            return fn(*map(jnp.asarray, arrays))

    def off_by_one(fn, *arrays):
        result = np.array(eagerly(fn, *arrays))
        result.flat[-1] += 1
        return result

    assert not defects.find(defect, eagerly)
    assert defects.find(defect, off_by_one)


@pytest.mark.parametrize("name", ["jit", "pmap", "fsdp"])
@pytest.mark.parametrize("defect", CHECKED, ids=IDS)
def test_training_avoids_what_it_says_it_avoids(defect, name):
    strategy = train.make_strategy(name, num_devices=1)
    if not defect.is_avoided(is_guarded=strategy.is_guarded):
        pytest.skip("nothing avoids it")
    assert not defects.find(defect, as_in_training(strategy))


CRASH = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import jax.numpy as jnp, numpy as np
from jaxnets import train

def run(fn, *arrays):
    strategy = train.make_strategy(num_devices=1)
    return strategy.compile_eval(lambda axis_name: lambda state, batch: fn(*state))(arrays, {})

a, b = np.random.default_rng(0).normal(size=(2, 3, 1, 2, 2, 8, 8, 8)).astype(np.float32)
np.testing.assert_allclose(run(lambda a, b: (a * b).sum(3), a, b), (a * b).sum(3), atol=1e-5)
a, b = np.ones((10, 4, 6, 1, 1, 1, 1, 1), np.float32), np.ones((10, 4, 6, 9, 9, 9, 9, 9), np.float32)
logs = run(lambda a, b: jnp.log(jnp.maximum((a * b).sum(2), 1e-9)), a, b)
np.testing.assert_allclose(logs, np.log(6), rtol=1e-6)
"""


def test_training_does_not_crash():
    """In a process of its own: the first ends jaxlib 0.10.2, the second 0.11.0 as well."""
    done = subprocess.run(
        [sys.executable, "-c", CRASH],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"jaxlib {VERSION}: {done.returncode}\n{done.stderr}"


def compiled(fn, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn, compiler_options=programs.CPU_OPTIONS).lower(*arrays).compile().as_text()


def test_faulty_fusions_are_seen():
    """Compiled and not run."""
    product = compiled(lambda a, b: (a * b).sum(3), (3, 1, 2, 2, 8, 8, 8), (3, 1, 2, 2, 8, 8, 8))
    lengths = compiled(
        lambda m, x: jax.vmap(lambda x: jnp.sum((m @ x) ** 2))(x), (3, 3), (40_000, 3)
    )  # fmt: skip
    wide = compiled(lambda q, k: jnp.max(jnp.einsum("bqk,bsk->bqs", q, k), 2), (4, 64, 8), (4, 64, 8))
    rows = compiled(lambda m, x: jax.vmap(lambda x: jnp.sum((m @ x) ** 2))(x), (5, 7), (50_000, 7))
    for product_and_sum in (wide, rows):
        assert "__ynn_fusion" in product_and_sum
        assert defects._sums_products(product_and_sum.replace("dot(%", "dot(%other"))
    assert defects.faulty_fusions(wide, "0.10.2") == []
    assert not defects._sums_products(wide)
    assert defects._sums_products(f"{wide}\n  %one = f32[2]{{0}} dot(%that, %differs)")
    assert defects.faulty_fusions(rows, "0.10.2") == ["three-vectors"]
    harmless = compiled(lambda m, x: (jnp.tanh(x @ m).sum(0), x.sum(1)), (3, 8), (64, 3))
    assert "__ynn_fusion" in harmless
    assert defects.faulty_fusions(product, "0.10.2") == ["rank-7-sum"]
    assert defects.faulty_fusions(lengths, "0.10.2") == ["three-vectors"]
    assert defects.faulty_fusions(harmless, "0.10.2") == []
    assert defects.faulty_fusions(product, "0.99") == []
    assert defects.has_faulty_fusions("0.10.2")
    assert not defects.has_faulty_fusions("0.99")


@pytest.mark.skipif(jax.__version__ != "0.10.2", reason="of this version's defect")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_products_that_are_not_avoided_are_right(dtype, x64):
    """At numbers of rows at which those over fewer are wrong."""

    def is_right(size, columns, rows):
        rng = np.random.default_rng(size)
        x = rng.integers(-3, 4, (rows, size)).astype(dtype)
        matrix = rng.integers(-3, 4, (columns, size)).astype(dtype)
        run = jax.jit(
            lambda x, matrix: jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x),
            compiler_options=programs.CPU_OPTIONS,
        )
        return np.array_equal(run(x, matrix), np.square(x @ matrix.T).sum(axis=1))

    wide = [
        (size, columns, rows)
        for size in (*range(8, 18), 24, 31, 33, 64, 65)
        for columns in (2, size)
        for rows in (20_000, 40_000)
    ]
    assert [case for case in wide if not is_right(*case)] == []
    assert not is_right(3, 3, 40_000)
    if dtype == "float64":
        assert not any(is_right(size, size, 20_000) for size in (3, 5, 6))


@pytest.mark.parametrize("name", ["jit", "pmap", "fsdp"])
def test_one_careful_program_does_not_make_others_careful(name, monkeypatch):
    """A program is compiled once, and again only if it has a fault."""
    monkeypatch.setattr(jaxlib.version, "__version__", "0.10.2")
    compilations, looks = [], []

    def listen(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compilations.append(seconds)

    def look(program, version):
        looks.append(version)
        return ["a fault"] if re.search(r"f32\[(1,)?5,2\]", program) else []

    def make_step(axis_name):
        return lambda state, batch: state @ batch["x"].T

    monkeypatch.setattr(defects, "faulty_fusions", look)
    strategy = train.make_strategy(name, num_devices=1)
    step = strategy.compile_eval(make_step)
    arrays = {size: {"x": np.ones((size, 2), np.float32)} for size in (4, 5)}
    state = strategy.replicate(np.ones((3, 2), np.float32))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for size in (4, 4, 5, 5, 4):
            result = step(state, arrays[size])
            np.testing.assert_array_equal(result, np.full((3, size), 2))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert looks == ["0.10.2"] * 2
    assert len(compilations) == 3


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("name", ["jit", "pmap", "fsdp"])
def test_a_step_over_many_three_vectors_is_right(name, num_devices):
    """Lengths of turned vectors: as XLA's default options compile it, jaxlib 0.10.2 gets it wrong."""
    rng = np.random.default_rng(1)
    x_B3 = rng.integers(-3, 4, (40_000, 3)).astype(np.float32)
    matrix_33 = rng.integers(-3, 4, (3, 3)).astype(np.float32)

    def loss_fn(params, model_state, batch, *, key):
        length_B = jax.vmap(lambda x_3: jnp.sum((matrix_33 @ x_3) ** 2))(batch["x"])
        return {"loss": params * length_B}, model_state, {}

    strategy = train.make_strategy(name, num_devices=num_devices)
    tx = optax.sgd(1.0)
    initial = np.float32(2)
    state = strategy.init(lambda: train.create_state(lambda _: (initial, {}), tx, key=jax.random.key(0)))
    step = strategy.compile_step(partial(train.make_train_step, loss_fn, tx))
    mask_B = np.arange(40_000) >= 30_000
    state, values = step(state, {"x": x_B3, "mask": mask_B.astype(np.float32)})
    mean = np.square(x_B3.astype(np.float64) @ matrix_33.T).sum(1)[mask_B].mean()
    np.testing.assert_allclose(values["loss"], 2 * mean, rtol=1e-5)
    np.testing.assert_allclose(state.params, 2 - mean, rtol=1e-5)


SHAPES = {
    "update": r"stablehlo\.(dynamic_update_slice|scatter)",  # stacking in a loop is one too
    "rank 7": r"reduce\([^\n]*tensor<(\d+x){7,}f",
    "roll": r"@_roll_dynamic",
}


def shapes_in(fn, *arrays):
    """What a program that isn't compiled yet has in common with those that have a defect."""
    text = jax.jit(fn).lower(*arrays).as_text()
    assert "stablehlo." in text
    return [name for name, pattern in SHAPES.items() if re.search(pattern, text)]


def test_the_shapes_of_defects_are_seen():
    x = np.ones((8, 4), np.float32)
    y = np.ones((1, 2, 1, 2, 1, 2, 1), np.float32)
    assert shapes_in(lambda x: jax.lax.scan(lambda c, row: (c + row.sum(), c), 0.0, x), x) == ["update"]
    assert shapes_in(lambda x: x.at[1:].set(x[:-1]), x) == ["update"]
    assert shapes_in(lambda y: (y * y).sum(3), y) == ["rank 7"]
    assert shapes_in(jnp.roll, x[:, 0], 1) == ["roll"]
    assert shapes_in(lambda x: jnp.tanh(x).sum(1), x) == []


@pytest.mark.parametrize("model", ["lenet", "mlp", "resnet18", "speednet"])
def test_no_step_of_a_model_has_the_shape_of_a_defect(model):
    build = registry.get("model", model)
    example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init_fn, apply_fn = models.functional(build(num_classes=10), example)

    def loss_fn(params, model_state, batch, *, key):
        x_BHWC, position = ops.normalize_images(batch["image"]), batch["position"]
        x_BHWC = augment.random_flip(x_BHWC, key=key, position=position)
        x_BHWC = augment.random_crop(x_BHWC, 4, key=key, position=position)
        x_BHWC = augment.cutout(x_BHWC, 8, key=key, position=position)
        names = {"rows": batch["index"], "mask": batch["mask"]}
        logits_BV, model_state = apply_fn(params, model_state, x_BHWC, train=True, key=key, **names)
        return {"loss": losses.softmax_cross_entropy(logits_BV, batch["label"])}, model_state, {}

    tx = optax.sgd(0.1, momentum=0.9)
    arrays = {"image": np.zeros((64, 32, 32, 3), np.uint8), "label": np.zeros(64, np.int32)}
    batch = data.take(arrays, data.Batches(64, 16, num_positions=16)[0])
    state = jax.eval_shape(lambda: train.create_state(init_fn, tx, key=jax.random.key(0)))
    step = train.make_train_step(loss_fn, tx, accumulate=2)
    assert shapes_in(step, state, batch) == []


def test_the_line_says_what_training_avoids():
    line = defects.warning("0.10.2", "cpu", is_guarded=True, machine="x86_64")
    assert "training avoids three-vectors, rank-7-sum; the models here don't meet shifted" in line
    unprotected = defects.warning("0.10.2", "cpu", is_guarded=False, machine="x86_64")
    assert "training avoids" not in unprotected
    assert "don't meet three-vectors, rank-7-sum, shifted-update" in unprotected
    assert "rank-7-sum" not in defects.warning("0.10.2", "cpu", is_guarded=True, machine="aarch64")
    assert "three-vectors" not in defects.warning("0.10.2", "gpu", is_guarded=False)
    assert defects.warning("0.10.2", "tpu", is_guarded=False) is None
    assert defects.warning("0.9.0", "cpu", is_guarded=True) is None


def test_a_flag_of_the_user_counts(monkeypatch):
    def line():
        return defects.warning("0.10.2", "cpu", is_guarded=False, machine="x86_64")

    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 --{defects.YNN_OPTION}=-reduce --xla_b=2")
    assert "training avoids three-vectors, rank-7-sum" in line()
    monkeypatch.setenv("XLA_FLAGS", f"--{defects.YNN_OPTION}=")
    assert "training avoids three-vectors, rank-7-sum" in line()
    monkeypatch.setenv("XLA_FLAGS", f"--{defects.YNN_OPTION}=reduce")
    assert "training avoids" not in line()


def test_which_strategy_is_guarded():
    assert train.make_strategy("jit").is_guarded
    assert train.make_strategy("pmap").is_guarded
    assert not train.make_strategy("jit", use_jit=False).is_guarded


def test_speed_goes_by_version_and_is_no_warning():
    (loop,) = (d for d in defects.DEFECTS if d.source == "jax#40101")
    assert loop.check is None
    assert loop.is_known("0.11.1", "cpu")
    assert not loop.is_known("0.11.0", "cpu")
    assert "update-in-loop" not in (defects.warning("0.11.1", "cpu", is_guarded=True) or "")


def test_train_warns_once(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise errors.ConfigError("this is far enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxlib.version, "__version__", "0.10.2")
    monkeypatch.setattr(runner, "train", stop)
    monkeypatch.setenv("JAXNETS_CACHE", str(tmp_path / "cache"))
    words = ["train", "--dataset", "digits", "--model", "mlp", "--no-pictures"]
    found = []
    for _ in range(2):
        assert cli.main(cifar10.EXPERIMENT, words) == 2
        err = capsys.readouterr().err
        assert "far enough" in err
        found.append(re.findall(r"^warning: jaxlib 0\.10\.2 has known defects.*", err, re.M))
    assert [len(lines) for lines in found] == [1, 0]


def test_a_line_is_news_once_and_another_line_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXNETS_CACHE", str(tmp_path / "new" / "folder"))
    assert [defects.is_news(line) for line in ("one", "one", "two", "one", "two")] == [
        True,
        False,
        True,
        False,
        False,
    ]
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    assert defects.is_news("one", below)
    assert defects.is_news("one", below)


def test_doctor_prints_all(capsys):
    status = main(["doctor"])
    out = capsys.readouterr().out
    for defect in defects.DEFECTS:
        assert re.search(rf"^{defect.name} .*{re.escape(defect.source)}$", out, re.M)
    assert out.count(" checked ") == len(CHECKED)
    assert status == int("AFFECTED" in out)


def test_doctor_reports_a_wrong_number(capsys, monkeypatch):
    right = defects.Defect("fine", "values", "", (), (), "", "", check=lambda run: (1, np.array(1)))
    monkeypatch.setattr(defects, "DEFECTS", (right,))
    assert main(["doctor"]) == 0
    wrong = defects.Defect(
        "bad", "values", "this", (), (), "that", "x#1", check=lambda run: (1, np.array(2))
    )
    monkeypatch.setattr(defects, "DEFECTS", (right, wrong))
    assert main(["doctor"]) == 1
    assert re.search(
        r"bad +values +AFFECTED +AFFECTED +checked +x#1\n\nbad: this\n  instead: that",
        capsys.readouterr().out,
    )
