"""Text from a language model, token by token, with keys and values of what came before kept.

All of it is one program: prompts of different lengths stand at the left of their rows, each row goes on
at a place of its own, and what filled a shorter prompt up is never seen and then written over. A row
that reaches the model's longest length goes on from the last half of it.

What is drawn for a row follows from the key, the row's id and how many tokens were drawn for it: not
from the other rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxnets import errors
from jaxnets.models.gpt import GPT, Cache, empty_cache
from jaxnets.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: that logits are divided by; 0 takes the most likely token.
        top_k: draw from so many of the most likely tokens; None for all.
        top_p: draw from the fewest of the most likely tokens that have this probability together
            (Holtzman et al. 2020, arXiv 1904.09751), at least one; None for all. After top_k.

    Raises:
        ConfigError: if a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise errors.ConfigError(
                f"the temperature is a number of at least 0, not {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise errors.ConfigError(f"top_k is at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise errors.ConfigError(f"top_p lies in (0, 1], not {self.top_p}")


GREEDY = Sampling(temperature=0.0)


def restrict(logits: Array, sampling: Sampling) -> Array:
    """Logits with temperature, and -inf for tokens that top_k and top_p leave out.

    Of equally likely tokens at the limit all stay.

    Args:
        logits: `[B, V]`.
        sampling: with a temperature above 0.

    Returns:
        `[B, V]`, in at least float32.

    Example:
        >>> restrict(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), Sampling(top_p=0.7)).tolist()[0][2]
        -inf
    """
    chex.assert_rank(logits, 2)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Around the greatest: divided by a tiny temperature several would be infinite.
    scaled_BV = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    size = scaled_BV.shape[1]
    if sampling.top_k is not None and sampling.top_k < size:
        least = lax.top_k(scaled_BV, sampling.top_k)[0][:, -1:]
        scaled_BV = jnp.where(scaled_BV < least, -jnp.inf, scaled_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
        share_BV = jax.nn.softmax(sorted_BV)
        # Those before which less than top_p has come; the first one always.
        is_in = jnp.cumsum(share_BV, axis=-1) - share_BV < sampling.top_p
        least = jnp.min(jnp.where(is_in, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        scaled_BV = jnp.where(scaled_BV < least, -jnp.inf, scaled_BV)
    return scaled_BV


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """Where the rows have come to.

    Attributes:
        window: `[B, S]`, the tokens that the model sees, from the left of each row.
        place: `[B]`, where in it the last one stands, which isn't in the cache yet.
        cache: of the places before.
        count: of tokens that were chosen for each row.
        is_over: `[B]`, whether the stop token has come.
        rows: `[B]`, the ids of the rows.
        key: of the draws.
    """

    window: Array
    place: Array
    cache: Cache
    count: Array
    is_over: Array
    rows: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class Generator:
    """`begin` and `step`, of which `generate` and `stream` are made.

    Attributes:
        model: a language model that takes `places`, `cache` and `only`.
        size: S, places that are kept; at most the model's max_length.
        sampling: how tokens are chosen.
        stop: the token behind which a row is over; None for none.
        use_cache: otherwise all of the window is computed for each token.
    """

    model: GPT
    size: int
    sampling: Sampling = Sampling()
    stop: int | None = None
    use_cache: bool = True

    def begin(
        self, params: Params, prompts: Array, lengths: Array, rows: Array, key: Array
    ) -> Generation:
        """Read the prompts, all but the last token of each; arguments as of `generate`."""
        batch, longest = prompts.shape
        is_real = jnp.arange(longest)[None] < lengths[:, None]  # other tokens may be none of the model's
        prompts = jnp.where(is_real, prompts.astype(jnp.int32), 0)
        window = jnp.zeros((batch, self.size), jnp.int32).at[:, :longest].set(prompts)
        place = lengths.astype(jnp.int32) - 1
        cache: Cache = {}
        if self.use_cache:
            cache = self._fill(params, window[:, :longest])
        count, is_over = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
        return Generation(window, place, cache, count, is_over, rows, key)

    def step(self, params: Params, at: Generation) -> tuple[Generation, Array]:
        """Choose a token for each row.

        Returns:
            where the rows are now, and the tokens `[B]`; a row that is over has the stop token again.
        """
        if self.use_cache:
            tokens = jnp.take_along_axis(at.window, at.place[:, None], axis=1)
            logits_BTV, cache = self._apply(params, tokens, places=at.place[:, None], cache=at.cache)
            at = dataclasses.replace(at, cache=cache)
        else:
            logits_BTV = self._apply(params, at.window, only=at.place)
        token = self._choose(logits_BTV[:, 0], at)
        if self.stop is not None:
            token = jnp.where(at.is_over, self.stop, token)
            at = dataclasses.replace(at, is_over=at.is_over | (token == self.stop))
        return self._write(params, at, token), token

    def _choose(self, logits_BV: Array, at: Generation) -> Array:
        if self.sampling.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

        def draw(row: Array, count: Array, logits_V: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(at.key, row), count)
            return jax.random.categorical(key, logits_V)

        restricted_BV = restrict(logits_BV, self.sampling)
        return jax.vmap(draw)(at.rows, at.count, restricted_BV).astype(jnp.int32)

    def _write(self, params: Params, at: Generation, token: Array) -> Generation:
        """Put the tokens behind the last ones, in rows that are full behind the last half of them."""
        size = self.size

        def shift(at: Generation) -> Generation:
            is_full, keep = at.place + 1 >= size, size // 2
            moved = jnp.roll(at.window, keep, axis=1)  # the last `keep` come first
            window = jnp.where(is_full[:, None], moved, at.window)
            place = jnp.where(is_full, keep - 1, at.place)
            cache = self._fill(params, window) if self.use_cache else at.cache
            return dataclasses.replace(at, window=window, place=place, cache=cache)

        if size == self.model.max_length:  # otherwise there is room for all
            at = lax.cond(jnp.any(at.place + 1 >= size), shift, lambda at: at, at)
        place = at.place + 1
        window = at.window.at[jnp.arange(len(place)), place].set(token)
        return dataclasses.replace(at, window=window, place=place, count=at.count + 1)

    def _fill(self, params: Params, tokens: Array) -> Cache:
        """The cache of all places; of those behind a row's last token it is written over in time."""
        batch, length = tokens.shape
        dtype = jax.tree.leaves(params)[0].dtype
        cache = empty_cache(self.model, batch, self.size, dtype)
        places = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        only = jnp.zeros(batch, jnp.int32)
        return self._apply(params, tokens, places=places, cache=cache, only=only)[1]

    def _apply(self, params: Params, tokens: Array, **arguments: Any) -> Any:
        return self.model.apply({"params": params}, tokens, train=False, **arguments)


def generate(
    model: GPT,
    params: Params,
    prompts: Array,
    lengths: Array,
    num_tokens: int,
    *,
    key: Array,
    sampling: Sampling = Sampling(),
    stop: int | None = None,
    rows: Array | None = None,
    use_cache: bool = True,
) -> tuple[Array, Array]:
    """Go on from prompts; to be compiled as a whole.

    Args:
        model: a language model.
        params: its parameters.
        prompts: integers `[B, P]`, each from the left of its row; P is at most the model's max_length.
        lengths: `[B]`, tokens of each prompt, in [1, P]; what stands behind them is without effect.
        num_tokens: how many more, at least 1.
        key: a PRNG key for the draws.
        sampling: how tokens are chosen.
        stop: the token behind which a row is over. Once all are, nothing is computed any more.
        rows: `[B]`, the ids of the rows, to which their draws belong; 0, 1, ... by default.
        use_cache: false computes everything again for each token, for comparison.

    Returns:
        tokens `[B, num_tokens]`, and `[B]`, how many of them count: those up to the stop token, which is
        repeated behind it.

    Raises:
        ValueError: as `make_generator`.

    Example:
        >>> from jaxnets.models import gpt
        >>> model = gpt(5, max_length=8, num_layers=1, num_heads=1, width=4)
        >>> prompts = jnp.array([[1, 2, 3], [4, 0, 0]])
        >>> params = model.init(jax.random.key(0), prompts)["params"]
        >>> lengths, key = jnp.array([3, 1]), jax.random.key(1)
        >>> generate(model, params, prompts, lengths, 20, key=key)[0].shape
        (2, 20)
    """
    generator = make_generator(model, prompts, lengths, num_tokens, sampling, stop, use_cache)
    batch = len(prompts)
    rows = jnp.arange(batch) if rows is None else rows
    out = jnp.full((batch, num_tokens), 0 if stop is None else stop, jnp.int32)

    def body(carry: tuple[Array, Generation, Array]) -> tuple[Array, Generation, Array]:
        i, at, out = carry
        at, token = generator.step(params, at)
        return i + 1, at, lax.dynamic_update_index_in_dim(out, token, i, axis=1)

    def goes_on(carry: tuple[Array, Generation, Array]) -> Array:
        return (carry[0] < num_tokens) & ~jnp.all(carry[1].is_over)

    begun = generator.begin(params, prompts, lengths, rows, key)
    _, _, out = lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), begun, out))
    if stop is None:
        return out, jnp.full(batch, num_tokens)
    before = jnp.sum(jnp.cumsum(out == stop, axis=1) == 0, axis=1)
    return out, jnp.minimum(before + 1, num_tokens)


def stream(
    model: GPT,
    params: Params,
    prompts: np.ndarray,
    lengths: np.ndarray,
    num_tokens: int,
    *,
    key: Array,
    sampling: Sampling = Sampling(),
    stop: int | None = None,
) -> Iterator[np.ndarray]:
    """The same tokens as they come, `[B]` each, until there are enough or all rows are over.

    Arguments as of `generate`; it compiles its two programs itself.
    """
    generator = make_generator(model, prompts, lengths, num_tokens, sampling, stop)
    begin, step = _compiled(generator)
    at = begin(params, prompts, lengths, np.arange(len(prompts)), key)
    for _ in range(num_tokens):
        at, token = step(params, at)
        yield np.asarray(token)
        if stop is not None and np.all(at.is_over):
            return


def make_generator(
    model: GPT,
    prompts: Any,
    lengths: Any,
    num_tokens: int,
    sampling: Sampling,
    stop: int | None,
    use_cache: bool = True,
) -> Generator:
    """A generator with room for prompts `[B, P]` and as many tokens, as far as the model goes.

    Raises:
        ValueError: if the prompts are longer than the model takes, or that takes a single token, or
            num_tokens is below 1; and where the values of prompts and lengths are known, which under
            `jit` they aren't, if a length isn't in [1, P] or a token isn't the model's.
    """
    chex.assert_rank(prompts, 2)
    longest = prompts.shape[1]
    if not 0 < longest <= model.max_length:
        raise ValueError(f"prompts of {longest} tokens; this model takes 1 to {model.max_length}")
    if model.max_length < 2:
        raise ValueError("a model of one token can't go on: there is no place for the next")
    if num_tokens < 1:
        raise ValueError(f"the number of tokens is at least 1, not {num_tokens}")
    if stop is not None and not 0 <= stop < model.vocabulary_size:
        raise ValueError(f"the stop token {stop} is none of the model's {model.vocabulary_size}")
    _check_values(prompts, lengths, model.vocabulary_size)
    model = model.clone(returns_hidden=False, dropout_rate=0.0, remat="none")
    return Generator(model, min(longest + num_tokens, model.max_length), sampling, stop, use_cache)


def _is_known(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return True
    return not isinstance(x, Tracer) and x.is_fully_addressable


def _check_values(prompts: Any, lengths: Any, vocabulary_size: int) -> None:
    if not all(map(_is_known, (prompts, lengths))):
        return
    prompts, lengths = np.asarray(prompts), np.asarray(lengths)
    longest = prompts.shape[1]
    if not np.all((lengths >= 1) & (lengths <= longest)):
        raise ValueError(f"prompts have 1 to {longest} tokens, not {lengths.tolist()}")
    is_real = np.arange(longest)[None] < lengths[:, None]
    if np.any(is_real & ((prompts < 0) | (prompts >= vocabulary_size))):
        raise ValueError(f"a prompt has a token that is none of the model's {vocabulary_size}")


@functools.lru_cache(maxsize=8)
def _compiled(generator: Generator) -> tuple[Callable[..., Generation], Callable[..., Any]]:
    return jax.jit(generator.begin), jax.jit(generator.step, donate_argnums=1)
