"""The library's models in PyTorch, written as its users would, for parity and the duel."""
