"""PyTorch beside JAX: weight maps, parity, the duel. Importing this imports no PyTorch."""
