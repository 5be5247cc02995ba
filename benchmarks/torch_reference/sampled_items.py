"""Sampled items in PyTorch, the very ones of `jaxnets.ops.row_bits`, in integers of 64 bits.

J: items sampled beside one that was rated; T: tries for each; I: the items there are.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

_ALL_BITS = 0xFFFFFFFF


def make_sampler(
    key: Sequence[int], num_items: int, num_negatives: int, num_tries: int
) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    """Make what samples items that a user hasn't rated, as long as one of the tries finds one.

    Args:
        key: the words of the PRNG key.
        num_items: I.
        num_negatives: J.
        num_tries: T.

    Returns:
        `sampler(batch) -> items [B, 1 + J]`: the item that was rated, and the sampled ones, of "user",
        "item" and "position" `[B]`, and "seen", boolean `[U, I]`.
    """
    first, second = key[0], key[-1]
    count = num_negatives * num_tries
    places = _mix((torch.arange(count) + second) & _ALL_BITS).view(num_negatives, num_tries)
    by_device: dict[torch.device, torch.Tensor] = {}

    def sampler(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        user, item = batch["user"], batch["item"]
        if item.device not in by_device:
            by_device[item.device] = places.to(item.device)
        rows = _mix((_mix(batch["position"] ^ first) + second) & _ALL_BITS)
        tried = _mix(by_device[item.device] ^ rows[:, None, None]) % num_items
        is_rated = batch["seen"].take((user * num_items)[:, None, None] + tried)
        best = is_rated.to(torch.uint8).argmin(2, keepdim=True)  # the first of the least
        return torch.cat([item[:, None], tried.gather(2, best)[..., 0]], 1)

    return sampler


def _mix(x: torch.Tensor) -> torch.Tensor:
    """`jaxnets.ops.hash.mix`; a product that overflows keeps its lowest bits."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD & _ALL_BITS
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97 & _ALL_BITS
    return x ^ (x >> 15)
