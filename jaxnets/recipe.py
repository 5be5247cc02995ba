"""What an experiment is, as plain values: every command works on this."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxnets import errors

if TYPE_CHECKING:  # so that listing and configuring import neither JAX nor Optax
    import numpy as np
    import optax

    from jaxnets.data import Lengths
    from jaxnets.train.mesh import Rules
    from jaxnets.train.row_updates import Tables
    from jaxnets.typing import EvalFn, Indexed, LossFn, WeightsFn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Model, loss, optimizer, data and metrics; nothing is started by making one.

    Attributes:
        name: of the experiment.
        init_fn: `init_fn(key) -> (params, model_state)`.
        loss_fn: `loss_fn(params, model_state, batch, *, key) -> (terms, model_state, metrics)`, as
            `jaxnets.train.make_train_step` takes it.
        eval_fn: `eval_fn(params, model_state, batch) -> {name: metric}`.
        tx: the optimizer.
        train: to learn from: arrays `{name: [N, ...]}`, or a source that is read as it is needed, with
            `len(train)` and `train[i] -> {name: [...]}`.
        test: to evaluate on, the same of M examples.
        num_positions: how many examples the whole run draws, over all epochs.
        batch_size: examples in a global batch.
        accumulate: micro-batches in a batch.
        seed: of the parameters, the order and all randomness.
        ema_decay: of an average of the parameters, which evaluation then uses; None for none.
        patience: evaluations without a better one after which the run ends; 0 is never.
        partners: whether loss_fn gets another example for each, `batch["partner"]`, to mix it with; for
            data that is kept on the devices.
        weights_fn: `weights_fn(batch) -> {term: [B, ...]}`; the batch's mask by default.
        coefficients: of the loss's terms; 1 by default.
        eval_batch_size: examples in a global batch of evaluation.
        predict_fn: `predict_fn(params, model_state, batch) -> logits [B, ...]`, whose speed a duel
            compares; of a classifier, of images or with class_names, `[B, V]`, which are kept and drawn
            for the test set.
        class_names: of a classifier, one for each class, where the data set has them.
        learning_rate: `learning_rate(step)` is the rate of a step, counted from 0, for the record; it
            does not set the optimizer's.
        monitor: the metric of evaluation by which the best checkpoint is chosen.
        maximize: whether a greater value of it is better.
        test_name: what the examples of `test` are called in messages, such as "validation".
        lengths: of the examples' sequences, so that batches are of like length and little of them is
            padding; None where all have the same shape anyway.
        assets: files that belong to the model, such as its vocabulary, kept in the run's folder.
        stages: (step, loss_fn) in order: from that step on, counted from 0, this loss_fn is trained with
            instead, in a program of its own, as for images that grow during the run.
        rules: where the model's parameters lie on a mesh, for "fsdp" and "tensor", as ordered (pattern,
            spec), such as `models.gpt.sharding_rules()`; None if the model has none.
        tables: parameters that are tables, of which a step updates the rows of its batch alone; tx must
            be for rows, as those of `train.row_optim` are. None for none.
        on_nonfinite: what becomes of a step whose loss or gradients aren't finite: "stop" ends the run
            with nothing of it applied, "skip" goes on with the next.
        max_spike: a step is skipped if its loss or the norm of its gradients is more than so many
            standard deviations above the mean of about the last 128 steps; None for never.
        torch_reference: "module:function" that builds the same experiment in PyTorch, resolved by
            the duel alone; None if there is none.
        torch_arguments: what that function is called with.
    """

    name: str
    init_fn: "Callable[..., Any]"
    loss_fn: "LossFn"
    eval_fn: "EvalFn"
    tx: "optax.GradientTransformation"
    train: "Mapping[str, np.ndarray] | Indexed"
    test: "Mapping[str, np.ndarray] | Indexed"
    num_positions: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    ema_decay: float | None = None
    patience: int = 0
    partners: bool = False
    weights_fn: "WeightsFn | None" = None
    coefficients: Mapping[str, float] | None = None
    eval_batch_size: int = 512
    predict_fn: "Callable[..., Any] | None" = None
    class_names: Sequence[str] = ()
    learning_rate: Callable[[int], Any] | None = None
    monitor: str = "accuracy"
    maximize: bool = True
    test_name: str = "test"
    lengths: "Lengths | None" = None
    assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    stages: "Sequence[tuple[int, LossFn]]" = ()
    rules: "Rules | None" = None
    tables: "Tables | None" = None
    on_nonfinite: str = "stop"
    max_spike: float | None = None
    torch_reference: str | None = None
    torch_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def loss_fns(self) -> "dict[int, LossFn]":
        """What is trained with, by the step from which it is."""
        return {0: self.loss_fn, **dict(self.stages)}

    @property
    def use_health(self) -> bool:
        """Whether steps may be skipped, so that the state remembers them."""
        return self.on_nonfinite != "stop" or self.max_spike is not None

    @property
    def has_pictures(self) -> bool:
        """Whether it is a classifier of images, whose predictions are kept and drawn."""
        has_images = not isinstance(self.test, Mapping) or "image" in self.test
        return self.predict_fn is not None and has_images

    @property
    def num_examples(self) -> int:
        """N, the size of the training set."""
        return count_examples(self.train)

    @property
    def train_arrays(self) -> "Mapping[str, np.ndarray]":
        """The training set, where all of it must be in memory.

        Raises:
            ConfigError: if it is a source.
        """
        if isinstance(self.train, Mapping):
            return self.train
        raise errors.ConfigError(
            f"{self.name} reads its data from the disk as it is needed; this needs it in memory"
        )

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(self.num_positions / self.batch_size)


def count_examples(data: "Mapping[str, np.ndarray] | Indexed") -> int:
    """N, the examples in arrays or in a source."""
    return len(next(iter(data.values()))) if isinstance(data, Mapping) else len(data)


def count_positions(
    num_examples: int, batch_size: int, *, epochs: float, steps: int | None = None
) -> int:
    """How many examples a run draws.

    Args:
        num_examples: N.
        batch_size: B, from 1 to N.
        epochs: passes over the data, above 0; a part of one is allowed.
        steps: if given, the run is this many steps long, whatever `epochs` says.

    Raises:
        ConfigError: if one of them is out of range.

    Example:
        >>> count_positions(1000, 128, epochs=2), count_positions(1000, 128, epochs=2, steps=3)
        (2000, 384)
    """
    if batch_size < 1:
        raise errors.ConfigError(f"the batch size must be at least 1, not {batch_size}")
    if batch_size > num_examples:
        raise errors.ConfigError(
            f"batch size {batch_size} is larger than the training set of {num_examples} examples"
        )
    if steps is not None:
        if steps < 1:
            raise errors.ConfigError(f"steps must be at least 1, not {steps}")
        return steps * batch_size
    if not (math.isfinite(epochs) and epochs > 0):
        raise errors.ConfigError(f"epochs must be a finite number above 0, not {epochs}")
    return max(1, round(epochs * num_examples))
