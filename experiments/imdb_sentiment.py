"""Is a review for or against the film? On IMDB's, or any folder of text files in classes.

    python -m experiments.imdb_sentiment train --preset tutorial
    python -m experiments.imdb_sentiment predict "this movie is terrible" --preset tutorial

On the official 25,000 test reviews, seed 0, two cores of an AMD EPYC: `tutorial`, the LSTM of Keras's
tutorial, 85.9 % after 104 s of preparation and 409 s of training; `better`, naive Bayes with learnt
weights on runs of one to three words, 92.0 % after 121 s of preparation and 14 s of training. Without a
preset it learns from made reviews, which need no download. docs/sentiment.md says more.
"""

import csv
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import cli, errors, losses, metrics, models, registry, train
from jaxnets.commands import Command, SavedRun, read_texts, write_output
from jaxnets.config import RunOptions
from jaxnets.data import Lengths, texts
from jaxnets.data import vocabulary as vocab
from jaxnets.models import text_classifier
from jaxnets.recipe import Recipe, count_positions


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "made_reviews"  # imdb, or a folder of train/CLASS/*.txt and test/CLASS/*.txt
    model: str = "lstm_classifier"  # or weighted_naive_bayes
    vocabulary_size: int = 20_000  # words, with the two that stand for padding and for all others
    ngrams: int = 0  # if not 0, a text is the set of its runs of 1 to so many words
    ngrams_size: int = 800_000  # how many of these are known
    max_length: int = 200  # words of a text that count, the last ones; or runs, the shorter ones first
    buckets: tuple[int, ...] = (50, 100, 150, 200)  # lengths that batches have, up to max_length
    width: int = 128  # of a word's vector
    hidden: int = 128  # of the LSTM
    num_layers: int = 1  # of the LSTM
    is_bidirectional: bool = False  # whether the LSTM goes both ways
    pooling: str = "last"  # what of the LSTM counts: its last state, or "max", the greatest outputs
    dropout_rate: float = 0.2  # of the LSTM's input
    recurrent_dropout_rate: float = 0.2  # of its output on the way back
    epochs: float = 5.0  # passes over the training set
    steps: int | None = None  # in place of epochs
    batch_size: int = 32  # texts, over all devices
    accumulate: int = 1  # micro-batches in a batch
    optimizer: str = "adam"  # as python -m jaxnets list has them
    learning_rate: float = 0.001  # per step, at its highest
    schedule: str = "constant"  # constant, linear or cosine
    weight_decay: float = 0.0  # per step, as PyTorch's optimizer of that name has it
    dtype: str = "float32"  # of the computation: float32 or bfloat16; of the LSTM alone
    ema_decay: float | None = None  # of an average of the parameters, which evaluation then uses
    seed: int = 0  # of the parameters, the order and dropout


def make_recipe(config: Config, options: RunOptions) -> Recipe:
    if config.dtype not in ("float32", "bfloat16"):
        raise errors.unknown("dtype", config.dtype, ("float32", "bfloat16"))
    for name in ("width", "hidden", "num_layers"):
        if getattr(config, name) < 1:
            raise errors.ConfigError(f"{name} must be at least 1, not {getattr(config, name)}")
    reviews = texts.load_texts(config.dataset, data_dir=options.data_dir, verify=options.verify)
    words = vocab.Words.of_texts(reviews.train, config.vocabulary_size)
    encoded = words.encode(reviews.train)
    reader = Reader(words, learn_ngrams(config, encoded, len(words)), config.max_length)
    train_tokens, train_lengths = reader.rows(reader.features(encoded))
    test_tokens, test_lengths = reader.read(reviews.test)
    num_classes = len(reviews.class_names)
    init_fn, apply_fn = make_model(config, len(reader), num_classes)
    if config.model == "weighted_naive_bayes":
        mask = np.arange(config.max_length)[None] < train_lengths[:, None]
        init_fn = models.with_ratios(
            init_fn,
            train_tokens,
            mask,
            reviews.train_label,
            vocabulary_size=len(reader),
            num_classes=num_classes,
        )
    num_positions = count_positions(
        len(reviews.train), config.batch_size, epochs=config.epochs, steps=config.steps
    )
    num_steps = -(-num_positions // config.batch_size)
    schedule = train.make_schedule(config.schedule, config.learning_rate, num_steps)
    optimizer = registry.get("optimizer", config.optimizer)

    def forward(params, model_state, batch, *, train, key=None):
        shape = batch.get("tokens_mask", batch["tokens"]).shape  # as long as this batch needs
        mask_BT = jnp.arange(shape[1])[None] < batch["length"][:, None]
        return apply_fn(
            params,
            model_state,
            batch["tokens"][:, : shape[1]],
            train=train,
            key=key,
            rows=batch["index"],
            mask=mask_BT,
        )

    def predict_fn(params, model_state, batch):
        return forward(params, model_state, batch, train=False)[0]

    def loss_fn(params, model_state, batch, *, key):
        logits_BV, model_state = forward(params, model_state, batch, train=True, key=key)
        loss = losses.softmax_cross_entropy(logits_BV, batch["label"])
        correct = metrics.is_correct(logits_BV, batch["label"])
        return {"loss": loss}, model_state, {"accuracy": metrics.Mean.of(correct, batch["mask"])}

    def eval_fn(params, model_state, batch):
        logits_BV = predict_fn(params, model_state, batch)
        loss = losses.softmax_cross_entropy(logits_BV, batch["label"])
        correct = metrics.is_correct(logits_BV, batch["label"])
        return {
            "accuracy": metrics.Mean.of(correct, batch["mask"]),
            "loss": metrics.Mean.of(loss, batch["mask"]),
        }

    return Recipe(
        name="imdb_sentiment",
        init_fn=init_fn,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        tx=optimizer(
            config.learning_rate if config.schedule == "constant" else schedule,
            weight_decay=config.weight_decay,
        ),
        train={"tokens": train_tokens, "length": train_lengths, "label": reviews.train_label},
        test={"tokens": test_tokens, "length": test_lengths, "label": reviews.test_label},
        lengths=Lengths({"tokens": train_lengths}, {"tokens": test_lengths}, widths(config)),
        assets=reader.to_assets() | {"classes.txt": "\n".join(reviews.class_names).encode()},
        num_positions=num_positions,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        ema_decay=config.ema_decay,
        predict_fn=predict_fn,
        class_names=reviews.class_names,
        learning_rate=schedule,
        rules=text_classifier.sharding_rules(len(reader)),
        torch_reference="benchmarks.torch_reference.text_classifier:reference",
        torch_arguments={
            "model": config.model,
            "vocabulary_size": len(reader),
            "num_classes": num_classes,
            "optimizer": config.optimizer,
            "learning_rate": config.learning_rate,
            "dtype": config.dtype,
            **{name: getattr(config, name) for name in _FIELDS},
            # It refuses these.
            **{
                name: getattr(config, name)
                for name in ("schedule", "weight_decay", "ema_decay", "ngrams")
                if getattr(config, name) != getattr(Config(), name)
            },
        },
    )


# Of the LSTM.
_FIELDS = ("width", "hidden", "num_layers", "is_bidirectional", "pooling")
_FIELDS += ("dropout_rate", "recurrent_dropout_rate")


class Reader:
    """Texts as rows of numbers: words in order, or the set of their n-grams."""

    def __init__(self, words: vocab.Words, ngrams: vocab.NGrams | None, max_length: int):
        self.words, self.ngrams, self.max_length = words, ngrams, max_length

    @classmethod
    def of_run(cls, run: SavedRun) -> "Reader":
        """The one that a run was trained with."""
        words = vocab.Words.from_bytes(run.asset("words.json"))
        runs = vocab.NGrams.from_bytes(run.asset("ngrams")) if run.config.ngrams else None
        return cls(words, runs, run.config.max_length)

    @property
    def unit(self) -> str:
        """What a text consists of."""
        return "words" if self.ngrams is None else "runs of words"

    @property
    def num_special(self) -> int:
        """Numbers that stand for no word: padding, and in a row of words also unknown ones."""
        return 2 if self.ngrams is None else 1

    def __len__(self) -> int:
        return len(self.words if self.ngrams is None else self.ngrams)

    def read(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `[N, max_length]` and lengths `[N]`."""
        return self.rows(self.features(self.words.encode(texts)))

    def features(self, encoded: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All of each text, whose words are numbers already."""
        return list(encoded) if self.ngrams is None else self.ngrams.encode(encoded)

    def rows(self, features: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """As many of them as count, and how many these are."""
        keep = "last" if self.ngrams is None else "first"
        return vocab.pad(features, self.max_length, keep=keep)

    def to_assets(self) -> dict[str, bytes]:
        """What `of_run` reads."""
        words = {"words.json": self.words.to_bytes()}
        return words if self.ngrams is None else words | {"ngrams": self.ngrams.to_bytes()}


def learn_ngrams(config: Config, encoded: Sequence[np.ndarray], base: int) -> vocab.NGrams | None:
    if not config.ngrams:
        return None
    return vocab.NGrams.of_encoded(encoded, config.ngrams_size, config.ngrams, base)


def widths(config: Config) -> tuple[int, ...]:
    if config.max_length < 1:
        raise errors.ConfigError(f"max_length is {config.max_length}; it must be at least 1")
    return (*sorted(w for w in config.buckets if 0 < w < config.max_length), config.max_length)


def make_model(config: Config, vocabulary_size: int, num_classes: int):
    build = registry.get("text_model", config.model)
    fields = {}
    if config.model == "lstm_classifier":
        fields = {name: getattr(config, name) for name in _FIELDS}
        fields["dtype"] = None if config.dtype == "float32" else jnp.dtype(config.dtype)
    model = build(vocabulary_size, num_classes, **fields)
    return models.functional(model, jax.ShapeDtypeStruct((1, config.max_length), jnp.int32))


_TOGETHER = 256  # texts that are classified at a time


@dataclasses.dataclass(frozen=True)
class Predict:
    input: Path | None = None  # A text file with a review on each line, in place of words.
    output: Path | None = None  # A CSV file for the outcome, in place of the terminal.


def predict(run: SavedRun, words: Sequence[str], flags: Predict) -> None:
    """Say of each text what class it is of, and how sure that is."""
    given, places = read_texts(words, flags.input, example='predict "this movie is terrible"')
    names = run.asset("classes.txt").decode().split("\n")
    reader = Reader.of_run(run)
    features = reader.features(reader.words.encode(given))
    for place, row in zip(places, features, strict=True):
        if not np.any(row >= reader.num_special):
            print(f"warning: {place} has no word that is known", file=sys.stderr)
        if len(row) > reader.max_length:
            what = f"{len(row):,} {reader.unit}, of which {reader.max_length:,} count"
            print(f"warning: {place} has {what}", file=sys.stderr)
    _, apply_fn = make_model(run.config, len(reader), len(names))
    _, params, model_state = run.model

    @jax.jit
    def classify(tokens_NT, lengths):
        mask_NT = jnp.arange(tokens_NT.shape[1])[None] < lengths[:, None]
        logits_NV, _ = apply_fn(params, model_state, tokens_NT, train=False, mask=mask_NT)
        return jax.nn.softmax(logits_NV.astype(jnp.promote_types(logits_NV.dtype, jnp.float32)))

    rows = []
    size = min(len(given), _TOGETHER)
    for first in range(0, len(given), size):
        part = features[first : first + size]
        filled = part + [part[0]] * (size - len(part))  # so that all parts share one program
        for text, row in zip(given[first:], np.asarray(classify(*reader.rows(filled))), strict=False):
            best = int(row.argmax())
            rows.append((names[best], f"{row[best]:.4f}", text))
    rows = rows[: len(given)]
    if flags.output is None:
        for name, probability, text in rows:
            shown = " ".join(text.split())
            print(f"{name}  {probability}  {shown if len(shown) <= 80 else shown[:76] + ' ...'}")
        return
    content = io.StringIO(newline="")
    head = ("class", "probability", "text")
    for row in (head, *rows):
        # The library quotes what has a line feed in it, and not what has a carriage return.
        quoting = csv.QUOTE_ALL if "\r" in row[-1] else csv.QUOTE_MINIMAL
        csv.writer(content, lineterminator="\n", quoting=quoting).writerow(row)
    write_output(flags.output, content.getvalue(), f"{len(rows):,} predictions")


TUTORIAL = Config(dataset="imdb")

# A weight for each run of up to three words, from naive Bayes (Wang & Manning 2012).
BETTER = Config(
    dataset="imdb",
    model="weighted_naive_bayes",
    vocabulary_size=100_000,
    ngrams=3,
    max_length=2048,
    buckets=(256, 512, 1024),
    epochs=4,
)

EXPERIMENT = cli.Experiment(
    name="imdb_sentiment",
    about="Sentiment of film reviews, or classes of any texts.",
    config=Config(max_length=100, buckets=(25, 50), epochs=3),
    make_recipe=make_recipe,
    duel={"dropout_rate": 0.0, "recurrent_dropout_rate": 0.0},
    presets={"tutorial": TUTORIAL, "better": BETTER},
    commands={
        "predict": Command("say of texts what class they are of", predict, Predict(), words="TEXT")
    },
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
