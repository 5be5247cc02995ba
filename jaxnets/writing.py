"""What a trained language model does on the command line: go on from prompts, and judge texts."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import data, errors, losses, models
from jaxnets.commands import SavedRun, read_texts, write_output
from jaxnets.models.gpt import GPT, output_table
from jaxnets.typing import Params

VOCABULARY = "vocabulary.json"
"""The asset that the vocabulary is kept as."""

_NUM_NEXT = 5  # tokens that may come next and are shown
_ROWS = 64  # windows that are judged at a time
_MOST_LOGITS = 2**24  # that there are at a time
MakeModel = Callable[[Any, int], GPT]


@dataclasses.dataclass(frozen=True)
class Generate:
    """How to go on from prompts."""

    num_tokens: int = 500  # How many tokens to write.
    temperature: float = 0.8  # That logits are divided by; 0 takes the most likely token.
    top_k: int | None = None  # Draw from so many of the most likely tokens; all by default.
    # Draw from the fewest of the most likely tokens that have this probability together.
    top_p: float | None = None
    seed: int = 0  # Of the draws.


@dataclasses.dataclass(frozen=True)
class Predict:
    """Which texts to judge, and where to write what."""

    input: Path | None = None  # A file with a text on each line, in place of words.
    output: Path | None = None  # A file for the results, one JSON object in each line.


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model with its vocabulary.

    Attributes:
        model: a language model.
        params: its parameters.
        tokenizer: its vocabulary.
    """

    model: GPT
    params: Params
    tokenizer: data.Tokenizer

    @classmethod
    def of_run(cls, run: SavedRun, make_model: MakeModel) -> "Writer":
        """The model of a run.

        Args:
            run: that was trained.
            make_model: `make_model(config, vocabulary_size)`.

        Raises:
            ConfigError: if the vocabulary isn't the model's.
        """
        tokenizer = data.read_tokenizer(run.asset(VOCABULARY))
        _, params, _ = run.model
        size = len(params["token_embedding"]["embedding"])
        if size != tokenizer.size:
            raise errors.ConfigError(
                f"{run.folder}: the vocabulary has {tokenizer.size} tokens and the model {size}"
            )
        return cls(make_model(run.config, size), params, tokenizer)

    def encode(self, text: str, place: str) -> np.ndarray:
        """Tokens `[N]`, at least one.

        Raises:
            DataError: if the text is empty, or has a character that the vocabulary hasn't.
        """
        if not text:
            raise errors.DataError(f"{place} is empty")
        try:
            return self.tokenizer.encode(text)
        except errors.DataError as error:
            raise errors.DataError(f"{place}: {error}") from None

    def beginning(self) -> str:
        """What a text begins behind where nothing is given: a line's end, a blank, or any character."""
        known = [data.decode(self.tokenizer, [i]) for i in range(self.tokenizer.size)]
        return next((text for text in ("\n", " ") if text in known), next(filter(None, known)))

    def prompts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts `[B, P]` from the left, and their lengths `[B]`.

        Of a prompt that is longer than the model's context the end is taken, with a warning.
        """
        rows, longest = [], self.model.max_length
        for i, text in enumerate(texts):
            tokens = self.encode(text, f"prompt {i + 1}")
            if len(tokens) > longest:
                what = f"prompt {i + 1} has {len(tokens):,} tokens"
                print(f"warning: {what}; the model sees the last {longest:,} of them", file=sys.stderr)
            rows.append(tokens[-longest:])
        lengths = np.array([len(row) for row in rows])
        prompts = np.zeros((len(rows), lengths.max()), np.int32)
        for row, tokens in zip(prompts, rows, strict=True):
            row[: len(tokens)] = tokens
        return prompts, lengths

    def stream(
        self, text: str, num_tokens: int, *, seed: int, sampling: models.Sampling
    ) -> Iterator[str]:
        """What follows a prompt, as it comes."""
        prompts, lengths = self.prompts([text])
        tokens = models.stream(
            self.model,
            self.params,
            prompts,
            lengths,
            num_tokens,
            key=jax.random.key(seed),
            sampling=sampling,
        )
        return data.decode_stream(self.tokenizer, (int(token[0]) for token in tokens))

    def write(
        self, texts: Sequence[str], num_tokens: int, *, seed: int, sampling: models.Sampling
    ) -> list[str]:
        """What follows each of several prompts, in one program."""
        prompts, lengths = self.prompts(texts)

        @jax.jit
        def run(params: Params, prompts: jax.Array, lengths: jax.Array, key: jax.Array):
            # All draw as the first row does, so that each is written as it would be alone.
            rows = jnp.zeros(len(texts), jnp.int32)
            how: Any = {"key": key, "sampling": sampling, "rows": rows}
            return models.generate(self.model, params, prompts, lengths, num_tokens, **how)

        tokens, _ = run(self.params, prompts, lengths, jax.random.key(seed))
        return [data.decode(self.tokenizer, row) for row in np.asarray(tokens)]

    def judge(self, texts: Sequence[str], places: Sequence[str]) -> list[dict[str, Any]]:
        """How likely texts are.

        Args:
            texts: of any length; a long one is cut into windows of the context.
            places: what they are called, for messages.

        Returns:
            of each the "text", its number of "tokens", the mean "loss" of a token but the first and its
            "perplexity" (None of a single token), and as "next" pairs of what may follow and how likely.
        """
        rows = [self.encode(text, place) for text, place in zip(texts, places, strict=True)]
        totals, shares = self._totals(rows), self._shares(rows)
        return [
            self._judgement(text, len(tokens), total, share_V)
            for text, tokens, total, share_V in zip(texts, rows, totals, shares, strict=True)
        ]

    def _judgement(self, text: str, count: int, total: float, share_V: np.ndarray) -> dict[str, Any]:
        mean = total / (count - 1) if count > 1 else None
        most = np.argsort(-share_V, kind="stable")[:_NUM_NEXT]
        return {
            "text": text,
            "tokens": count,
            "loss": mean,
            "perplexity": None if mean is None else math.exp(mean),
            "next": [[data.decode(self.tokenizer, [int(i)]), float(share_V[i])] for i in most],
        }

    def _totals(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The sum of each text's losses, `[M]`."""
        context = self.model.max_length
        windows = [  # each begins with the token that ends the one before it
            (i, tokens[first : first + context + 1])
            for i, tokens in enumerate(rows)
            for first in range(0, len(tokens) - 1, context)
        ]
        totals = np.zeros(len(rows))
        for group, tokens in _in_groups([window for _, window in windows], context + 1):
            loss_BT = np.asarray(_losses(self.model, self.params, tokens))
            for row, loss_T in zip(group, loss_BT, strict=False):
                i, window = windows[row]
                totals[i] += np.sum(loss_T[: len(window) - 1], dtype=np.float64)
        return totals

    def _shares(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """How likely each token comes next, `[V]` for each text."""
        context, found = self.model.max_length, []
        ends = [tokens[-context:] for tokens in rows]
        for group, tokens in _in_groups(ends, context):
            last = np.zeros(len(tokens), np.int32)
            last[: len(group)] = [len(ends[row]) - 1 for row in group]
            found += list(np.asarray(_next(self.model, self.params, tokens, last))[: len(group)])
        return found


def _in_groups(rows: Sequence[np.ndarray], longest: int) -> Iterator[tuple[range, np.ndarray]]:
    """The numbers of some rows at a time, and their tokens `[B, T]`.

    B and T are powers of two, or T is the longest, so that few programs serve all.
    """
    for first in range(0, len(rows), _ROWS):
        group = range(first, min(first + _ROWS, len(rows)))
        size = min(_power_of_two(max(len(rows[row]) for row in group)), longest)
        tokens = np.zeros((_power_of_two(len(group)), size), np.int32)
        for i, row in enumerate(group):
            tokens[i, : len(rows[row])] = rows[row]
        yield group, tokens


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@partial(jax.jit, static_argnums=0)
def _losses(model: GPT, params: Params, window: jax.Array) -> jax.Array:
    hidden: Any = model.clone(returns_hidden=True).apply({"params": params}, window[:, :-1])
    table = output_table(model, params)
    chunk = max(1, _MOST_LOGITS // (len(window) * len(table)))
    return losses.chunked_cross_entropy(hidden, table, window[:, 1:], chunk=chunk)


@partial(jax.jit, static_argnums=0)
def _next(model: GPT, params: Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
    logits_BTV: Any = model.apply({"params": params}, tokens, only=last)
    return jax.nn.softmax(logits_BTV[:, 0].astype(jnp.promote_types(logits_BTV.dtype, jnp.float32)))


def make_generate(make_model: MakeModel) -> Callable[[SavedRun, Sequence[str], Generate], None]:
    """The command `generate [PROMPT ...]`, which shows one prompt's text as it comes.

    Texts of several prompts come together at the end.

    Args:
        make_model: `make_model(config, vocabulary_size)` of a run's config.
    """

    def run(saved: SavedRun, words: Sequence[str], flags: Generate) -> None:
        sampling = models.Sampling(flags.temperature, flags.top_k, flags.top_p)
        if flags.num_tokens < 1:
            raise errors.ConfigError(f"num_tokens is {flags.num_tokens}; it must be at least 1")
        writer = Writer.of_run(saved, make_model)
        options = {"seed": flags.seed, "sampling": sampling}
        prompts = [_unescaped(word) for word in words] or [writer.beginning()]
        if len(prompts) == 1:
            pieces = writer.stream(prompts[0], flags.num_tokens, **options)
            print(prompts[0], end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
            return
        written = writer.write(prompts, flags.num_tokens, **options)
        for i, (prompt, text) in enumerate(zip(prompts, written, strict=True), start=1):
            print(f"--- {i} ---\n{prompt}{text}")

    return run


def make_predict(make_model: MakeModel) -> Callable[[SavedRun, Sequence[str], Predict], None]:
    """The command `predict [TEXT ...]`.

    Args:
        make_model: `make_model(config, vocabulary_size)` of a run's config.
    """

    def run(saved: SavedRun, words: Sequence[str], flags: Predict) -> None:
        texts, places = read_texts(words, flags.input, example='predict "To be, or not"')
        if flags.input is None:
            texts = [_unescaped(text) for text in texts]
        writer = Writer.of_run(saved, make_model)
        found = writer.judge(texts, places)
        if flags.output is not None:
            lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in found)
            write_output(flags.output, lines, f"{len(found):,} results")
            return
        for each in found:
            follows = ", ".join(f"{token!r} {share:.1%}" for token, share in each["next"])
            how = f"{each['tokens']} tokens; "
            if each["loss"] is not None:
                how = f"loss {each['loss']:.4f}, perplexity {each['perplexity']:.2f} of {how}"
            print(f"{each['text']}\n  {how}next {follows}")

    return run


def _unescaped(word: str) -> str:
    r"""A prompt as it is typed: `\n` is a line's end."""
    return word.replace("\\n", "\n")
