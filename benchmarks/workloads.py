"""The reference workloads: what is compared with PyTorch, at which size."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the suite.

    Attributes:
        name: as `--only` takes it.
        model: a registered model.
        batch_size: examples in a step.
        mode: "train" or "inference".
        steps_per_call: of JAX's compiled program, in training.
        parity_steps: training steps compared in both precisions before anything is timed.
        fields: others of the experiment's config.
        module: the experiment.
        dataset: of it, generated.
    """

    name: str
    model: str
    batch_size: int
    mode: str = "train"
    parity_steps: int = 20
    steps_per_call: int = 1
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: str = "experiments.cifar10"
    dataset: str = "random_images"


_SMALL_STEPS = {"learning_rate": 0.001}
_RATINGS = {"module": "experiments.movielens", "dataset": "generated-1m", "parity_steps": 3}
_PENALTY = {"schedule": "constant", "penalty": 0.05, "bias_penalty": 0.05}
_ROWS = {"fields": {**_PENALTY, "update_rows": True, "optimizer": "lazy_adam"}, **_RATINGS}
_TABLES = {"fields": _PENALTY, **_RATINGS}
# Of films that were rated and sampled ones, as in the presets tutorial, neumf and two-tower.
_BCE = {"fields": {"schedule": "constant", "loss": "bce"}, **_RATINGS}
_SOFTMAX = {"fields": {"schedule": "constant", "loss": "softmax", "num_negatives": 16}, **_RATINGS}
_SHAKESPEARE = "experiments.shakespeare"
# What PyTorch's reference has, too: no schedule and no clipping.
_PLAIN = {"dataset": "random_text", "schedule": "constant", "warmup": 0.0, "clip_norm": None}
_GPT = {**_PLAIN, "num_layers": 4, "num_heads": 8, "width": 256, "context": 256}
_NANOGPT = {**_PLAIN, "num_layers": 4, "num_heads": 4, "width": 128, "context": 64}
_LSTM = {
    "module": "experiments.imdb_sentiment",
    "dataset": "random_texts",
    "fields": {
        "dropout_rate": 0.0,
        "recurrent_dropout_rate": 0.0,
        "vocabulary_size": 20_000,
        "max_length": 200,
    },
}
_TRANSFORMER = {
    "module": "experiments.multi30k",
    "dataset": "phrases",
    "fields": {
        **{"num_layers": 3, "num_heads": 4, "width": 256, "hidden": 512, "dropout": 0.0},
        **{"max_length": 20, "learning_rate": 0.001, "schedule": "constant", "warmup": 0.0},
        **{"clip_norm": None, "ema_decay": None},
    },
}
_ATTENTION_RNN = {**_TRANSFORMER, "fields": {**_TRANSFORMER["fields"], "hidden": 256}}

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("lenet-4", "lenet", 4, steps_per_call=16, fields=_SMALL_STEPS),
        Workload("lenet-128", "lenet", 128, fields=_SMALL_STEPS),
        Workload("resnet18-128", "resnet18", 128, parity_steps=3, fields=_SMALL_STEPS),
        Workload("speednet-256", "speednet", 256, parity_steps=3, fields=_SMALL_STEPS),
        # Lazy Adam on rows against SparseAdam, and Adam on whole tables.
        Workload("factorization-1024", "matrix_factorization", 1024, **_ROWS),
        Workload("factorization-16384", "matrix_factorization", 16384, **_ROWS),
        Workload("factorization-dense-1024", "matrix_factorization", 1024, **_TABLES),
        Workload("factorization-dense-16384", "matrix_factorization", 16384, **_TABLES),
        Workload("factorization-1-inference", "matrix_factorization", 1, "inference", **_TABLES),
        Workload("factorization-128-inference", "matrix_factorization", 128, "inference", **_TABLES),
        Workload("embedding-dot-1024", "embedding_dot", 1024, **_BCE),
        Workload("neumf-1024", "neumf", 1024, **_BCE),
        Workload("two-tower-1024", "two_tower", 1024, **_SOFTMAX),
        Workload("gpt-16", "gpt", 16, parity_steps=3, fields=_GPT, module=_SHAKESPEARE),
        Workload("nanogpt-12", "gpt", 12, parity_steps=3, fields=_NANOGPT, module=_SHAKESPEARE),
        Workload("gpt-1-inference", "gpt", 1, "inference", 1, fields=_GPT, module=_SHAKESPEARE),
        Workload("gpt-128-inference", "gpt", 128, "inference", 1, fields=_GPT, module=_SHAKESPEARE),
        Workload("lstm-32", "lstm_classifier", 32, parity_steps=3, **_LSTM),
        Workload("lstm-1-inference", "lstm_classifier", 1, "inference", 1, **_LSTM),
        Workload("lstm-128-inference", "lstm_classifier", 128, "inference", 1, **_LSTM),
        Workload("transformer-128", "transformer", 128, parity_steps=3, **_TRANSFORMER),
        Workload("attention-rnn-64", "attention_rnn", 64, parity_steps=3, **_ATTENTION_RNN),
        Workload("lenet-1-inference", "lenet", 1, "inference", 3, fields=_SMALL_STEPS),
        Workload("lenet-128-inference", "lenet", 128, "inference", 3, fields=_SMALL_STEPS),
        Workload("resnet18-1-inference", "resnet18", 1, "inference", 1, fields=_SMALL_STEPS),
        Workload("resnet18-128-inference", "resnet18", 128, "inference", 1, fields=_SMALL_STEPS),
    )
}
