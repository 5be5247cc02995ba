"""PyTorch beside JAX: weight maps both ways, parity, the duel. Importing this imports no PyTorch."""
