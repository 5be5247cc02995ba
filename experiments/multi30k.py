"""Translation from German to English on Multi30k, or any parallel corpus of two text files.

    python -m experiments.multi30k train                        # phrases made here, without a download
    python -m experiments.multi30k train --preset transformer   # Multi30k, 1.3 MB to download
    python -m experiments.multi30k score --preset transformer   # BLEU on test 2016, by sacrebleu
    python -m experiments.multi30k translate --preset transformer "Ein Hund läuft am Strand."

On two cores of an AMD EPYC the preset `transformer` trains for 58 minutes and translates test 2016 with
BLEU 37.04 (lower-cased), `attention-rnn` for 27 minutes with 38.60. docs/translation.md says more.
"""

import dataclasses
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import cli, data, errors, losses, metrics, models, registry, train, translation
from jaxnets.config import RunOptions
from jaxnets.data.parallel import load_parallel
from jaxnets.data.subwords import BEGIN, PAD, Subwords, encode_all
from jaxnets.data.vocabulary import pad
from jaxnets.models import attention_rnn, transformer
from jaxnets.recipe import Recipe, count_positions
from jaxnets.train import optim

_BUCKETS = (12, 16, 20, 26)  # lengths of batches, up to the longest

_RULES = {
    "transformer": transformer.sharding_rules(),
    "attention_rnn": attention_rnn.sharding_rules(),
}


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "transformer"  # or attention_rnn
    # phrases, which are made here; multi30k; or a folder in the data folder with files such as
    # train.de, val.de, test.de and the same of the other language.
    dataset: str = "phrases"
    source: str = "de"  # the ending of the files of what is translated
    target: str = "en"  # that of the translations
    lowercase: bool = True  # whether capital letters become small ones, on both sides
    vocabulary_size: int = 500  # subwords, of both sides together
    max_length: int = 48  # tokens of a sentence; longer ones are left out of training
    num_layers: int = 2  # of the transformer's encoder and decoder each
    width: int = 64  # of embeddings and layers
    num_heads: int = 4  # of the transformer
    hidden: int = 128  # width between the transformer's linear layers; the RNN's state
    dropout: float = 0.1  # probability of dropping an element
    epochs: float = 4.0  # passes over the training set
    steps: int | None = None  # in place of epochs
    batch_size: int = 64  # pairs of sentences, over all devices
    accumulate: int = 1  # micro-batches in a batch
    optimizer: str = "adamw"  # adam, adamw, lion, ... (python -m jaxnets list)
    learning_rate: float = 0.003  # per step, at its highest
    schedule: str = "cosine"  # constant, linear or cosine, after the warm-up
    warmup: float = 0.1  # share of the run in which the learning rate rises
    momentum: float = 0.9  # decay of the first moment
    weight_decay: float = 0.0  # of matrices alone
    clip_norm: float | None = 1.0  # of the gradients
    ema_decay: float | None = 0.99  # of an average of the parameters, which evaluation then uses
    label_smoothing: float = 0.1  # probability taken from the right token
    dtype: str = "float32"  # of the computation: float32 or bfloat16
    patience: int = 0  # evaluations without a better one after which the run ends; 0 is never
    on_nonfinite: str = "stop"  # or "skip": what becomes of a step that isn't finite
    seed: int = 0  # of the parameters, the order and dropout


def make_recipe(config: Config, options: RunOptions) -> Recipe:
    optimizer = registry.get("optimizer", config.optimizer)
    _check(config)
    corpus = load_parallel(
        config.dataset,
        source=config.source,
        target=config.target,
        data_dir=options.data_dir,
        verify=options.verify,
    )
    learnt = corpus.parts["train"]
    subwords = Subwords.learn(
        [*learnt.source, *learnt.target], config.vocabulary_size, lowercase=config.lowercase
    )
    train_set, train_lengths = _arrays(subwords, learnt, config.max_length, cut=False)
    test_set, test_lengths = _arrays(subwords, corpus.parts["val"], config.max_length, cut=True)
    buckets = [*(n for n in _BUCKETS if n < config.max_length), config.max_length]
    num_positions = count_positions(
        len(train_set["source"]), config.batch_size, epochs=config.epochs, steps=config.steps
    )
    schedule = train.make_schedule(
        config.schedule,
        config.learning_rate,
        -(-num_positions // config.batch_size),
        warmup=config.warmup,
    )
    is_constant = config.schedule == "constant" and not config.warmup
    tx = optimizer(
        config.learning_rate if is_constant else schedule,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        decay_mask=optim.matrices_only,
    )
    if config.clip_norm is not None:
        tx = optim.clipped(tx, config.clip_norm)
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init_fn, apply_fn = models.functional(
        make_model(config, len(subwords)), {"source": example, "target": example}
    )

    def logits_and_labels(params, model_state, batch, **options):
        mask = mask_of(batch, "source")  # as long as this batch needs
        source, target = (batch[name][:, : mask.shape[1]] for name in ("source", "target"))
        # What has been said so far: the sentence behind the token that begins it.
        begin = jnp.full_like(target[:, :1], BEGIN)
        said = jnp.concatenate([begin, target[:, :-1]], axis=1)
        tokens = {"source": source, "target": said}
        logits_BTV, model_state = apply_fn(params, model_state, tokens, mask={"source": mask}, **options)
        return logits_BTV, target, model_state

    def loss_fn(params, model_state, batch, *, key):
        logits_BTV, target, model_state = logits_and_labels(
            params, model_state, batch, train=True, key=key, rows=batch["index"]
        )
        loss = losses.softmax_cross_entropy(logits_BTV, target, label_smoothing=config.label_smoothing)
        return {"loss": loss}, model_state, {}

    def predict_fn(params, model_state, batch):
        return logits_and_labels(params, model_state, batch, train=False)[0]

    def eval_fn(params, model_state, batch):
        logits_BTV, target, _ = logits_and_labels(params, model_state, batch, train=False)
        loss = losses.softmax_cross_entropy(logits_BTV, target)
        correct, mask = metrics.is_correct(logits_BTV, target), mask_of(batch, "target")
        return {
            "loss": metrics.Mean.of(loss, mask),
            "accuracy": metrics.Mean.of(correct, mask),
        }

    return Recipe(
        name="multi30k",
        init_fn=init_fn,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        tx=tx,
        train=train_set,
        test=test_set,
        num_positions=num_positions,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        on_nonfinite=config.on_nonfinite,
        ema_decay=config.ema_decay,
        patience=config.patience,
        weights_fn=lambda batch: {"loss": mask_of(batch, "target")},
        eval_batch_size=128,
        learning_rate=schedule,
        monitor="loss",
        maximize=False,
        test_name="validation",
        rules=_RULES.get(config.model),
        lengths=data.Lengths(train_lengths, test_lengths, buckets),
        assets={translation.SUBWORDS: subwords.to_bytes()},
        predict_fn=predict_fn,
        torch_reference="benchmarks.torch_reference.translation:reference",
        torch_arguments={
            "vocabulary_size": len(subwords),
            "max_length": 2 * config.max_length,
            "dropout_rate": config.dropout,
            **{name: getattr(config, name) for name in _KNOWN_THERE},
            # It refuses these.
            **{
                name: getattr(config, name)
                for name, plain in _ONLY_HERE.items()
                if getattr(config, name) != plain
            },
        },
    )


_KNOWN_THERE = (
    *("model", "num_layers", "num_heads", "width", "hidden", "label_smoothing", "optimizer"),
    *("learning_rate", "momentum", "weight_decay", "dtype"),
)
# Parts of the recipe that the PyTorch reference doesn't have, and their value where they aren't in use.
_ONLY_HERE = {"schedule": "constant", "warmup": 0.0, "clip_norm": None, "ema_decay": None}


def mask_of(batch, side: str):
    """Which places of a side are no padding, `[B, T]`: that of a draw by length, or all there are."""
    return batch[f"{side}_mask"] if f"{side}_mask" in batch else batch[side] != PAD


def make_model(config: Config, vocabulary_size: int):
    fields = {"dtype": None if config.dtype == "float32" else jnp.dtype(config.dtype)}
    if config.model == "transformer":
        fields |= {"num_layers": config.num_layers, "num_heads": config.num_heads}
        fields |= {"max_length": 2 * config.max_length}
    return registry.get("translation_model", config.model)(
        vocabulary_size=vocabulary_size,
        width=config.width,
        hidden=config.hidden,
        dropout_rate=config.dropout,
        **fields,
    )


def _arrays(subwords: Subwords, pairs: data.Pairs, max_length: int, *, cut: bool):
    """Tokens `[N, L]` and their numbers `[N]`, by side."""
    sides = {
        name: encode_all(subwords, texts, place)
        for name, texts, place in zip(
            ("source", "target"), (pairs.source, pairs.target), pairs.places, strict=True
        )
    }
    fits = [max(map(len, both)) <= max_length for both in zip(*sides.values(), strict=True)]
    if not cut and not any(fits):
        raise errors.DataError(f"no pair of sentences has at most {max_length} tokens a side")
    if not all(fits):
        what = "pairs in validation are cut" if cut else "pairs are left out of training"
        warnings.warn(
            f"{fits.count(False):,} of {len(fits):,} {what}: a side has more than {max_length} tokens "
            "(--max-length)",
            UserWarning,
            stacklevel=2,
        )
    if not cut:
        sides = {
            name: [row for row, ok in zip(rows, fits, strict=True) if ok] for name, rows in sides.items()
        }
    lengths = {name: np.array([len(row) for row in rows]) for name, rows in sides.items()}
    return {name: pad(rows, max_length, keep="first")[0] for name, rows in sides.items()}, lengths


def _check(config: Config) -> None:
    if not 0 <= config.label_smoothing <= 1:
        raise errors.ConfigError(f"label smoothing lies in [0, 1], not {config.label_smoothing}")
    if config.dtype not in ("float32", "bfloat16"):
        raise errors.unknown("dtype", config.dtype, ("float32", "bfloat16"))
    if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
        raise errors.ConfigError(f"ema_decay lies in [0, 1), not {config.ema_decay}")
    if not 0 <= config.dropout < 1:
        raise errors.ConfigError(f"dropout lies in [0, 1), not {config.dropout}")
    for name in ("num_layers", "num_heads", "width", "hidden"):
        if getattr(config, name) < 1:
            raise errors.ConfigError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.model == "transformer" and config.width % config.num_heads:
        raise errors.ConfigError(
            f"a width of {config.width} doesn't split into {config.num_heads} heads"
        )
    if config.max_length < 2:
        raise errors.ConfigError(f"max_length counts tokens, at least 2, not {config.max_length}")


TRANSFORMER = Config(
    dataset="multi30k",
    vocabulary_size=6000,
    num_layers=3,
    width=256,
    num_heads=4,
    hidden=512,
    dropout=0.3,
    epochs=12,
    batch_size=128,
    learning_rate=0.0015,
    warmup=0.12,
    ema_decay=0.997,
)

EXPERIMENT = cli.Experiment(
    name="multi30k",
    about="Translation from German to English on Multi30k, or any parallel corpus of two text files.",
    config=Config(),
    make_recipe=make_recipe,
    presets={
        "transformer": TRANSFORMER,
        "attention-rnn": dataclasses.replace(TRANSFORMER, model="attention_rnn", hidden=256, epochs=8),
    },
    commands=translation.make_commands(make_model),
    duel=_ONLY_HERE,
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
