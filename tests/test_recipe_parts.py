"""The parts of a recipe together, by the command line: resumed, on other devices, ended early."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import cifar10
from jaxnets import cli, data, errors, runner
from jaxnets.config import RunOptions
from jaxnets.data import Batches
from jaxnets.train import Checkpoints, hooks, make_strategy
from jaxnets.train.sharding import gather_rows

PARTS = [
    "--no-pictures",
    *("--dataset", "digits", "--model", "mlp", "--batch-size", "64", "--steps", "12"),
    *("--optimizer", "adamw", "--learning-rate", "0.01", "--weight-decay", "0.1"),
    *("--schedule", "cosine", "--warmup", "0.2", "--clip-norm", "1", "--ema-decay", "0.8"),
    *("--no-decay-biases", "--freeze", "^dense1/bias", "--crop", "2", "--flip", "alternate"),
    *("--cutout", "8", "--mixup", "0.4", "--eval-views", "6"),
    *("--log-every", "1", "--checkpoint-every", "5"),
]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(folder, *words):
    return cli.main(cifar10.EXPERIMENT, ["train", *words, "--run-dir", str(folder)])


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_every_part_goes_on_exactly(tmp_path, monkeypatch, capsys):
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    assert train(whole, *PARTS, "--num-devices", "1") == 0

    def interrupt(self, step, state, metrics):
        if step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hooks.ShowProgress, "__call__", interrupt)
        assert train(broken, *PARTS, "--num-devices", "1") == 130
    capsys.readouterr()
    assert train(broken, *PARTS, "--num-devices", "1") == 0
    assert "resuming at step 5 of 12" in capsys.readouterr().err
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


STAGES = [
    *("--no-pictures", "--dataset", "digits", "--model", "speednet", "--whiten", "--batch-size", "32"),
    *("--optimizer", "muon_sgd", "--learning-rate", "0.1", "--steps", "9", "--window", "28"),
    *("--train-sizes", "12", "12", "16", "--log-every", "1", "--checkpoint-every", "7"),
]


def test_a_short_run_in_stages(tmp_path, capsys):
    words = [*STAGES, "--steps", "3", "--train-sizes", "9", "16", "--num-devices", "1"]
    assert train(tmp_path / "r", *words) == 0
    out, err = capsys.readouterr()
    assert "compiled again" not in err
    assert "confusion.png" not in out  # without pictures
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    usages = runner.check_recipe(
        cifar10.make_recipe(
            cifar10.Config(
                dataset="digits",
                model="speednet",
                batch_size=32,
                steps=3,
                window=28,
                train_sizes=(9, 16),
            ),
            RunOptions(),
        ),
        make_strategy(num_devices=1),
    )
    small, large = (usages[begin].flops_per_example for begin in (0, 2))
    assert large > 2 * small
    assert result["flops_per_example"] == round((2 * small + large) / 3)


@pytest.mark.long
def test_images_grow_during_a_run_which_goes_on_exactly(tmp_path, monkeypatch, capsys):
    """And nothing moves the whitening kernel; the stages' programs are no surprise to the guard."""
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    assert train(whole, *STAGES, "--num-devices", "1") == 0
    assert "compiled again" not in capsys.readouterr().err

    def interrupt(self, step, state, metrics):
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hooks.ShowProgress, "__call__", interrupt)
        assert train(broken, *STAGES, "--num-devices", "1") == 130
    assert train(broken, *STAGES, "--num-devices", "1") == 0
    assert "resuming at step 7 of 9" in capsys.readouterr().err
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()

    recipe = cifar10.make_recipe(
        cifar10.Config(
            dataset="digits",
            model="speednet",
            optimizer="muon_sgd",
            whiten=True,
            batch_size=32,
            steps=9,
            train_sizes=(12, 12, 16),
        ),
        RunOptions(),
    )
    assert [begin for begin, _ in recipe.stages] == [6]
    make_state = runner.make_state(recipe)
    strategy = make_strategy(num_devices=1)
    before = strategy.init(make_state).params
    after, _ = Checkpoints(whole / "checkpoints").restore(9, strategy.abstract(make_state))
    np.testing.assert_array_equal(after.params["whiten"]["kernel"], before["whiten"]["kernel"])
    assert (np.asarray(after.params["whiten"]["bias"]) != before["whiten"]["bias"]).any()
    assert (np.asarray(after.params["head"]["kernel"]) != before["head"]["kernel"]).any()


def test_mixing_takes_its_share_of_images_and_of_labels():
    config = cifar10.Config(dataset="digits", model="mlp", batch_size=8, steps=1)
    plain = cifar10.make_recipe(config, RunOptions())
    mixed = cifar10.make_recipe(dataclasses.replace(config, mixup=1.0), RunOptions())
    assert mixed.partners
    params, model_state = plain.init_fn(jax.random.key(0))
    draw = Batches(plain.num_examples, 8, 8, partners=True)[0]
    batch = gather_rows(plain.train_arrays, draw)
    for name, x in plain.train_arrays.items():
        np.testing.assert_array_equal(batch["partner"][name], x[draw["partner"]])

    def losses_of(recipe, batch):
        return recipe.loss_fn(params, model_state, batch, key=jax.random.key(1))[0]["loss"]

    own = {name: batch[name] for name in ("image", "label", "index")}
    same = {**batch, "partner": own}
    np.testing.assert_allclose(losses_of(mixed, same), losses_of(plain, batch), rtol=1e-5)
    assert np.abs(losses_of(mixed, batch) - losses_of(plain, batch)).mean() > 1e-2
    # An image that is mixed with itself under another label: the labels' losses in complementary shares.
    # What is left of the first with the labels the other way round is what was taken before.
    label = (batch["label"] + 1) % 10
    there = losses_of(mixed, {**same, "partner": {**own, "label": label}})
    back = losses_of(mixed, {**same, "label": label, "partner": own})
    both = losses_of(plain, batch) + losses_of(plain, {**batch, "label": label})
    np.testing.assert_allclose(there + back, both, rtol=1e-5)
    assert np.abs(there - back).mean() > 1e-3


@pytest.mark.parametrize("num_views", [2, 6])
def test_evaluation_takes_the_mean_over_the_views(num_views):
    config = cifar10.Config(dataset="digits", model="mlp")
    one, several = (
        cifar10.make_recipe(dataclasses.replace(config, eval_views=n), RunOptions())
        for n in (1, num_views)
    )
    state = jax.jit(runner.make_state(one))()
    image = np.asarray(data.load("digits").test["image"][:3])

    def logits(recipe, image):
        assert recipe.predict_fn is not None
        return recipe.predict_fn(state.params, state.model_state, {"image": image})

    def both(image):
        return (logits(one, image) + logits(one, image[:, :, ::-1])) / 2

    expected = both(image)
    if num_views == 6:
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        moved = both(padded[:, 2:, 2:]) + both(padded[:, :-2, :-2])
        expected = expected / 2 + moved / 4
    np.testing.assert_allclose(logits(several, image), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(logits(one, image) - expected).max() > 1e-2


@pytest.mark.parametrize("preset", sorted(cifar10.EXPERIMENT.presets))
def test_a_preset_fits_its_images(preset, monkeypatch):
    """Whole runs of them take minutes; this one traces all of their stages."""
    digits = data.open_images("digits", size=32)
    colours = {
        # More of them than in the largest batch.
        part: {"image": np.tile(x["image"], (2, 1, 1, 3)), "label": np.tile(x["label"], 2)}
        for part, x in (("train", digits.train), ("test", digits.test))
    }
    monkeypatch.setattr(
        data,
        "open_images",
        lambda *_, **__: dataclasses.replace(digits, **colours),
    )
    recipe = cifar10.make_recipe(cifar10.EXPERIMENT.presets[preset], RunOptions())
    usages = runner.check_recipe(recipe, make_strategy(num_devices=1))
    costs = [usage.flops_per_example for usage in usages.values()]
    assert costs == sorted(set(costs))  # images grow


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixup", "0.2", "--stream"], "only where the data is kept in memory"),
        (["--mixup", "nan"], "mixup must be a finite number"),
        (["--eval-views", "3"], "eval_views is one of (1, 2, 6), not 3"),
        (["--whiten"], "only speednet has a first layer to whiten, not lenet"),
        (["--window", "40"], "window 40 exceeds the image"),
        (["--train-sizes", "0"], "sizes of images are at least 1 pixel"),
        (["--model", "speednet", "--train-sizes", "4", "32"], "does not fit what it is trained on"),
        (["--train-sizes", "28"], "does not fit what it is trained on from step 0 on"),
        (["--window", "28"], "does not fit what it is trained on from step 0 on"),
        (["--train-sizes", "28", "32"], "the model does not fit what it is trained on"),
        (["--train-sizes", "32", "28", "--steps", "0"], "steps must be at least 1"),
    ],
)
def test_stages_that_cannot_be_are_one_line(tmp_path, capsys, words, message):
    assert train(tmp_path / "r", "--dataset", "digits", *words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert message in err[0]
    assert not (tmp_path / "r").exists()


@pytest.mark.long
def test_a_run_with_every_part_is_the_same_on_eight_devices(tmp_path):
    whole, spread = (tmp_path / name for name in ("whole", "spread"))
    for folder, num_devices in ((whole, "1"), (spread, "8")):
        assert train(folder, *PARTS, "--num-devices", num_devices) == 0
    for one, eight in zip(rows(whole), rows(spread), strict=True):
        assert one.keys() == eight.keys()
        for name, value in one.items():
            np.testing.assert_allclose(eight[name], value, rtol=1e-3, err_msg=f"{name} {one['step']}")


def test_a_run_that_gets_no_better_ends_and_stays_ended(tmp_path, capsys):
    flags = [
        "--no-pictures",
        "--dataset",
        "digits",
        "--model",
        "mlp",
        "--batch-size",
        "64",
        "--steps",
        "30",
    ]
    flags += ["--learning-rate", "0", "--eval-every", "4", "--patience", "2", "--keep-best", "2"]
    folder = tmp_path / "run"
    assert train(folder, *flags) == 0
    assert "ended after step 12: 2 evaluations without a better one" in capsys.readouterr().err
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["epochs"]) == (12, round(12 * 64 / 1438, 4))
    before = rows(folder)
    assert [row["step"] for row in before if "eval/accuracy" in row] == [4, 8, 12]
    # The two best of equals are the earlier ones.
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "00000004",
        "00000008",
        "00000012",
    ]
    assert result["best_steps"] == [4, 8]
    assert train(folder, *flags) == 0
    assert rows(folder) == before
    assert json.loads((folder / "result.json").read_text()) == result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flip", "randm"], "did you mean 'random'"),
        (["--schedule", "cosin"], "did you mean 'cosine'"),
        (["--dtype", "float16"], "unknown dtype"),
        (["--crop", "-1"], "crop must be at least 0"),
        (["--ema-decay", "1"], "ema_decay lies in"),
        (["--clip-norm", "0"], "finite norm above 0"),
        (["--freeze", "nothing"], "nothing to freeze"),
        (["--freeze", "*norm"], "is no regular expression"),
        (["--crop", "32"], "is not less than the image"),
        (["--profile-steps", "-1"], "profile_steps is -1"),
        (["--warmup", "1"], "warmup"),
        (["--keep-best", "0"], "keep_best is 0"),
    ],
)
def test_bad_parts_are_one_clear_line(tmp_path, capsys, words, message):
    folder = tmp_path / "run"
    assert train(folder, "--dataset", "digits", "--model", "mlp", *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parity
def test_the_duel_refuses_parts_that_its_reference_lacks():
    from benchmarks.torch_reference import classifier

    with pytest.raises(errors.ConfigError, match="does not have --flip, --clip-norm; leave it out"):
        classifier.reference(
            model="lenet",
            image_shape=(32, 32, 3),
            num_classes=10,
            optimizer="sgd",
            learning_rate=0.1,
            flip="random",
            clip_norm=1.0,
        )


@pytest.mark.parity
def test_the_duel_refuses_an_average(tmp_path, capsys):
    words = ["duel", "--dataset", "digits", "--ema-decay", "0.9", "--run-dir", str(tmp_path / "run")]
    assert cli.main(cifar10.EXPERIMENT, words) == 2
    assert "does not have --ema-decay" in capsys.readouterr().err


def test_streams_under_pmap_and_a_profile(tmp_path):
    flags = ["--no-pictures", "--dataset", "digits", "--model", "mlp", "--batch-size", "64"]
    flags += ["--steps", "6", "--log-every", "1", "--num-devices", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, *flags, "--strategy", "pmap", "--stream", "--profile-steps", "2") == 0
    assert list((one / "profile").rglob("*.xplane.pb"))
    assert train(two, *flags, "--profile-steps", "50") == 0  # more than there are: it ends with the run
    assert list((two / "profile").rglob("*.xplane.pb"))
    for streamed, resident in zip(rows(one), rows(two), strict=True):
        np.testing.assert_allclose(list(streamed.values()), list(resident.values()), rtol=1e-4)
