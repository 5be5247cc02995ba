"""Image classification on CIFAR-10, MNIST, or any folder of idx files or of images.

    python -m experiments.cifar10 train --preset tutorial

The tutorial that this library comes from trains LeNet at batch 4 for two epochs and claims 85 %. Two
cores of an AMD EPYC (Zen 5) train it for 30 to 34 s and reach 54.8 % (98 of the 60,000 images
substituted).
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp

from jaxnets import cli, data, errors, losses, metrics, models, ops, registry
from jaxnets.config import RunOptions
from jaxnets.recipe import Recipe, count_positions


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "lenet"  # lenet, convnet or mlp
    # cifar10, mnist, digits, or a folder in the data folder: of idx files, or of images as
    # train/CLASS/IMAGE and test/CLASS/IMAGE, which are read as they are needed.
    dataset: str = "cifar10"
    image_size: int = 32  # pixels, height and width to which the images of a folder are brought
    epochs: float = 10.0  # passes over the training set
    steps: int | None = None  # in place of epochs
    batch_size: int = 128  # examples, over all devices
    accumulate: int = 1  # micro-batches in a batch
    optimizer: str = "sgd"  # sgd, adam or adamw
    learning_rate: float = 0.05  # per step
    momentum: float = 0.9  # of sgd; the decay of the first moment for the others
    weight_decay: float = 0.0  # per step, as PyTorch's optimizer of that name has it
    label_smoothing: float = 0.0  # probability taken from the label
    seed: int = 0  # of the parameters, the order and dropout


def make_recipe(config: Config, options: RunOptions) -> Recipe:
    build = registry.get("model", config.model)
    optimizer = registry.get("optimizer", config.optimizer)
    tx = optimizer(config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
    if not 0 <= config.label_smoothing <= 1:
        raise errors.ConfigError(f"label smoothing lies in [0, 1], not {config.label_smoothing}")
    images = data.open_images(
        config.dataset, size=config.image_size, data_dir=options.data_dir, verify=options.verify
    )
    init_fn, apply_fn = models.functional(
        build(num_classes=images.num_classes),
        jax.ShapeDtypeStruct((1, *images.image_shape), jnp.float32),
    )

    def loss_fn(params, model_state, batch, *, key):
        x_BHWC = ops.normalize_images(batch["image"])
        rows, mask = batch["index"], batch["mask"]
        logits_BV, model_state = apply_fn(
            params, model_state, x_BHWC, train=True, key=key, rows=rows, mask=mask
        )
        loss = losses.softmax_cross_entropy(
            logits_BV, batch["label"], label_smoothing=config.label_smoothing
        )
        correct = metrics.is_correct(logits_BV, batch["label"])
        return {"loss": loss}, model_state, {"accuracy": metrics.Mean.of(correct, mask)}

    def eval_fn(params, model_state, batch):
        x_BHWC = ops.normalize_images(batch["image"])
        logits_BV, _ = apply_fn(params, model_state, x_BHWC, train=False)
        loss = losses.softmax_cross_entropy(logits_BV, batch["label"])
        correct = metrics.is_correct(logits_BV, batch["label"])
        return {
            "accuracy": metrics.Mean.of(correct, batch["mask"]),
            "loss": metrics.Mean.of(loss, batch["mask"]),
        }

    return Recipe(
        name="cifar10",
        init_fn=init_fn,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        tx=tx,
        train=images.train,
        test=images.test,
        num_positions=count_positions(
            images.num_train, config.batch_size, epochs=config.epochs, steps=config.steps
        ),
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        torch_reference="benchmarks.torch_reference.classifier:reference",
        torch_arguments={
            "model": config.model,
            "image_shape": images.image_shape,
            "num_classes": images.num_classes,
            "optimizer": config.optimizer,
            "learning_rate": config.learning_rate,
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
            "label_smoothing": config.label_smoothing,
        },
    )


EXPERIMENT = cli.Experiment(
    name="cifar10",
    about="Image classification on CIFAR-10, MNIST, or any folder of idx files or of images.",
    config=Config(),
    make_recipe=make_recipe,
    presets={"tutorial": Config(epochs=2, batch_size=4, learning_rate=0.001)},
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
