"""Windows of a long row of tokens as examples."""

import numpy as np

from jaxnets import errors


class Windows:
    """So many tokens in a row, from any place on: a source of N - L + 1 examples that overlap.

    Args:
        tokens: integers `[N]`; a file that is mapped into memory will do.
        length: L, of a window; of a model of context T it is T + 1, the last one being only predicted.

    Raises:
        DataError: if there are fewer tokens than that.

    Example:
        >>> windows = Windows(np.array([5, 6, 7, 8]), 3)
        >>> len(windows), windows[1]["tokens"].tolist()
        (2, [6, 7, 8])
        >>> windows.take(np.array([1, 0]))["tokens"].tolist()
        [[6, 7, 8], [5, 6, 7]]
    """

    def __init__(self, tokens: np.ndarray, length: int):
        if len(tokens) < length:
            raise errors.DataError(f"{len(tokens):,} tokens don't fill a window of {length:,}")
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return len(self._tokens) - self._length + 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return {"tokens": self._tokens[i : i + self._length]}

    def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The windows of `index [B]`, `[B, L]`."""
        return {"tokens": self._tokens[np.asarray(index)[:, None] + np.arange(self._length)]}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """`{"tokens": [N - L + 1, L]}`, a view: it takes no memory, nor does it on a device."""
        return {"tokens": np.lib.stride_tricks.sliding_window_view(self._tokens, self._length)}


def cut_into_windows(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Windows that predict every token but the first exactly once, for validation.

    Each but the last begins with the token that ends the one before it.

    Args:
        tokens: integers `[N]`, at least 2.
        length: L, tokens that a window predicts.

    Returns:
        `tokens` `[M, L + 1]` and `token_mask`, bool `[M, L]`, false behind the end in the last window.

    Raises:
        DataError: if there are fewer than 2 tokens.

    Example:
        >>> windows = cut_into_windows(np.array([5, 6, 7, 8]), 2)
        >>> windows["tokens"].tolist(), windows["token_mask"].tolist()
        ([[5, 6, 7], [7, 8, 0]], [[True, True], [True, False]])
    """
    if len(tokens) < 2:
        raise errors.DataError(f"{len(tokens)} tokens leave nothing to predict")
    num_windows = -(-(len(tokens) - 1) // length)
    padded = np.zeros(num_windows * length + 1, tokens.dtype)
    padded[: len(tokens)] = tokens
    view = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length]
    mask = np.arange(num_windows * length) < len(tokens) - 1
    return {"tokens": view.copy(), "token_mask": mask.reshape(num_windows, length)}
