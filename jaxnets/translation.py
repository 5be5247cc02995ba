"""Texts translated by a trained run: beam search over batches of like length, BLEU, and the commands."""

import dataclasses
import functools
import json
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxnets import errors
from jaxnets.commands import Command, SavedRun, check_output, read_texts, write_output
from jaxnets.data.buckets import bucket_of
from jaxnets.data.parallel import PARTS, load_parallel
from jaxnets.data.subwords import BEGIN, END, Subwords
from jaxnets.data.vocabulary import pad
from jaxnets.metrics import BLEU
from jaxnets.models.beam_search import beam_search
from jaxnets.report import draw_alignment
from jaxnets.train.files import write_atomically
from jaxnets.typing import Array, Params

SUBWORDS = "subwords.json"
"""The name of the vocabulary among a run's assets."""

_BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_ROWS = 50  # sentences that are translated together


@dataclasses.dataclass(frozen=True)
class Translator:
    """A model of translation with its vocabulary.

    Attributes:
        model: with `begin` and `step`, such as `models.Transformer`.
        params: of the model.
        subwords: of source and target.
        max_length: the longest source, in tokens.
        num_beams: W of the search.
        length_penalty: of the search.

    Raises:
        ConfigError: if the vocabulary isn't the model's.
    """

    model: nn.Module
    params: Params
    subwords: Subwords
    max_length: int
    num_beams: int = 5
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        size = self.params["embedding"]["embedding"].shape[0]
        if size != len(self.subwords):
            raise errors.ConfigError(
                f"the vocabulary has {len(self.subwords):,} subwords and the model {size:,}: it isn't "
                "the one that the model was trained with"
            )

    def translate(self, texts: Sequence[str], *, places: Sequence[str] | None = None) -> list[str]:
        """The best hypothesis for each text, in one line; arguments are those of `search`."""
        # An untrained model may say any byte, the end of a line too.
        found = self.search(texts, places=places)
        return [" ".join(self.subwords.decode(row).split()) for row in found]

    def search(self, texts: Sequence[str], *, places: Sequence[str] | None = None) -> list[list[int]]:
        """The tokens of the best hypothesis for each text, up to the one that ends it.

        Args:
            texts: M sentences.
            places: what each is called in messages; "text 1", "text 2", ... by default.

        Raises:
            DataError: if a text is empty, or longer than the model takes; it says which.
        """
        places = places or [f"text {i:,}" for i in range(1, len(texts) + 1)]
        tokens = [self._encode(text, place) for text, place in zip(texts, places, strict=True)]
        by_length = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        found: list[list[int]] = [[]] * len(texts)
        for begin in range(0, len(texts), _ROWS):
            rows = by_length[begin : begin + _ROWS]
            best = self._search([tokens[i] for i in rows], fill=len(texts) > _ROWS)
            for i, row in zip(rows, best, strict=True):
                said = row.tolist()
                found[i] = said[: said.index(END) + 1] if END in said else said
        return found

    def alignment(self, text: str, said: Sequence[int]) -> tuple[np.ndarray, list[str], list[str]]:
        """What each token of a hypothesis looks at, as the mean over layers and heads.

        Args:
            text: what was translated.
            said: the tokens of the hypothesis, at least one.

        Returns:
            weights `[T, S]`, and the text of the S tokens of the source and the T of the hypothesis.
        """
        source = self._encode(text, "text")
        inputs = {"source": jnp.array([source]), "target": jnp.array([[BEGIN, *said[:-1]]])}
        _, noted = self.model.apply({"params": self.params}, inputs, mutable=["intermediates"])
        weights = [
            np.asarray(x[0].mean(axis=0))
            for path, x in jax.tree_util.tree_leaves_with_path(noted)
            if any("cross_attention" in str(part) for part in path)
        ]
        return np.mean(weights, axis=0), self.subwords.pieces(source), self.subwords.pieces(said)

    def _encode(self, text: str, place: str) -> list[int]:
        try:
            tokens = self.subwords.encode(text)
        except errors.DataError as error:
            raise errors.DataError(f"{place}: {error}") from None
        if len(tokens) > self.max_length:
            raise errors.DataError(
                f"{place}: {len(tokens)} tokens; this model takes at most {self.max_length}"
            )
        return tokens

    def _search(self, tokens: Sequence[Sequence[int]], *, fill: bool) -> np.ndarray:
        (width,) = bucket_of(max(map(len, tokens)), [*_BUCKETS, self.max_length])
        width = min(width, self.max_length)
        missing = _ROWS - len(tokens) if fill else 0  # so that the last batch compiles nothing
        rows = [*tokens, *([[END]] * missing)]
        return np.asarray(self._compiled(self.params, *pad(rows, width, keep="first")))[: len(tokens)]

    @functools.cached_property
    def _compiled(self) -> Callable[..., Array]:
        return jax.jit(
            partial(
                best_hypotheses,
                self.model,
                num_beams=self.num_beams,
                length_penalty=self.length_penalty,
            )
        )


def best_hypotheses(
    model: nn.Module,
    params: Params,
    source: Array,
    lengths: Array,
    *,
    num_beams: int,
    length_penalty: float,
) -> Array:
    """The best hypothesis of beam search for each row; none is longer than 3/2 the source and eight.

    Args:
        model: with `begin` and `step`.
        params: of the model.
        source: tokens `[B, S]`.
        lengths: `[B]`, how many of a row's tokens are there.
        num_beams: W.
        length_penalty: alpha.

    Returns:
        tokens `[B, T]`.
    """
    batch, width = source.shape
    longest = min(width * 3 // 2 + 8, getattr(model, "max_length", width * 3 // 2 + 8))
    mask = jnp.arange(width)[None] < lengths[:, None]
    variables = {"params": params}
    memory, cache = model.apply(
        variables, source, mask=mask, num_beams=num_beams, max_length=longest, method="begin"
    )

    def step(tokens: Array, position: Array, cache: Any) -> Any:
        return model.apply(variables, tokens, position, cache, memory, method="step")

    tokens, _ = beam_search(
        step,
        cache,
        batch_size=batch,
        num_beams=num_beams,
        max_length=longest,
        begin=BEGIN,
        end=END,
        length_penalty=length_penalty,
        limits=jnp.minimum(lengths * 3 // 2 + 8, longest),
    )
    return tokens[:, 0]


@dataclasses.dataclass(frozen=True)
class TranslateFlags:
    """How `translate` works."""

    input: Path | None = None  # A text file to translate, one sentence a line, plain or .gz.
    output: Path | None = None  # Where the translations go, one a line; printed by default.
    num_beams: int = 5  # Hypotheses that the search keeps; 1 is greedy.
    length_penalty: float = 1.0  # 0 prefers short translations, more of it longer ones.
    picture: Path | None = None  # Of the attention; attention.png in the run's folder by default.


@dataclasses.dataclass(frozen=True)
class ScoreFlags:
    """How `score` works."""

    part: str = "test"  # Of the corpus: train, val or test.
    num_beams: int = 5  # Hypotheses that the search keeps; 1 is greedy.
    length_penalty: float = 1.0  # 0 prefers short translations, more of it longer ones.


def make_commands(make_model: Callable[[Any, int], nn.Module]) -> dict[str, Command]:
    """The commands of an experiment of translation: `translate`, of which `predict` is a name, `score`.

    Args:
        make_model: `make_model(config, vocabulary_size)`, as the experiment made it; its config has
            `dataset`, `source`, `target`, `lowercase` and `max_length`.
    """
    translate = Command(
        "translate TEXT ..., or the lines of --input FILE",
        partial(_translate, make_model),
        flags=TranslateFlags(),
        words="TEXT",
    )
    score = Command("BLEU on a part of the corpus", partial(_score, make_model), flags=ScoreFlags())
    return {"translate": translate, "predict": translate, "score": score}


def open_translator(make_model: Callable[[Any, int], nn.Module], run: SavedRun, **search) -> Translator:
    """The translator of a trained run.

    Raises:
        ConfigError: if the run has no vocabulary, or it isn't the model's, or a number is out of range.
        CheckpointError: if there is no checkpoint, or it can't be read.
    """
    if search["num_beams"] < 1 or not search["length_penalty"] >= 0:
        raise errors.ConfigError(
            "a search has at least 1 beam and a length penalty of at least 0, not "
            f"--num-beams {search['num_beams']} --length-penalty {search['length_penalty']}"
        )
    subwords = Subwords(run.asset(SUBWORDS))
    _, params, _ = run.model
    model = make_model(run.config, len(subwords))
    return Translator(model, params, subwords, run.config.max_length, **search)


def _translate(make_model, run: SavedRun, words: Sequence[str], flags: TranslateFlags) -> None:
    texts, places = read_texts(words, flags.input, example='translate "Ein Hund schläft."')
    if flags.picture is not None:
        check_output(flags.picture)
    search = {"num_beams": flags.num_beams, "length_penalty": flags.length_penalty}
    translator = open_translator(make_model, run, **search)
    found = translator.search(texts, places=places)
    _warn_of_unlearnt(translator.subwords, texts, places)
    lines = "".join(f"{' '.join(translator.subwords.decode(row).split())}\n" for row in found)
    if flags.output is None:
        sys.stdout.write(lines)
    else:
        write_output(flags.output, lines, f"{len(found):,} translations")
    if flags.input is None or flags.picture is not None:
        path = flags.picture or run.folder / "attention.png"
        picture = draw_alignment(*translator.alignment(texts[0], found[0]))
        try:
            write_atomically(path, picture)
            print(f"what the first looks at: {path}", file=sys.stderr)
        except OSError as error:  # the translation was printed all the same
            print(f"warning: {path} can't be written: {error.strerror or error}", file=sys.stderr)


def _warn_of_unlearnt(subwords: Subwords, texts: Sequence[str], places: Sequence[str]) -> None:
    unlearnt = {place: subwords.unlearnt(text) for text, place in zip(texts, places, strict=True)}
    of_them = [place for place, characters in unlearnt.items() if characters]
    if not of_them:
        return
    characters = sorted(set().union(*unlearnt.values()))
    # As numbers where they would change how the rest of the line looks.
    shown = [c if unicodedata.category(c)[0] not in "CMZ" else f"U+{ord(c):04X}" for c in characters]
    named = " ".join(shown[:20]) + (" ..." if shown[20:] else "")
    warnings.warn(
        f"{of_them[0]}{f' and {len(of_them) - 1:,} more' if of_them[1:] else ''}: no subword of this "
        f"model holds {named}: the translation may be wrong",
        UserWarning,
        stacklevel=1,
    )


def _score(make_model, run: SavedRun, words: Sequence[str], flags: ScoreFlags) -> None:
    if flags.part not in PARTS:
        raise errors.unknown("part", flags.part, PARTS)
    config = run.config
    corpus = load_parallel(
        config.dataset,
        source=config.source,
        target=config.target,
        data_dir=run.options.data_dir,
        verify=run.options.verify,
    )
    pairs = corpus.parts[flags.part]
    search = {"num_beams": flags.num_beams, "length_penalty": flags.length_penalty}
    translator = open_translator(make_model, run, **search)
    place = pairs.places[0] or flags.part
    places = [f"{place}, line {i:,}" for i in range(1, len(pairs) + 1)]
    found = translator.translate(pairs.source, places=places)
    bleu = BLEU.of(found, pairs.target, lowercase=config.lowercase)
    result = {
        "step": run.model[0],
        "part": flags.part,
        "sentences": len(pairs),
        "bleu": round(bleu.compute(), 2),
        "signature": bleu.signature,
        **search,
    }
    write_atomically(run.folder / f"{flags.part}.hypotheses.txt", "".join(f"{x}\n" for x in found))
    write_atomically(run.folder / f"{flags.part}.score.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
