"""Data: named sets, the order of the examples, batches. NumPy in, dict of NumPy out, never jax."""

from jaxnets.data.batches import Batches as Batches
from jaxnets.data.batches import take as take
from jaxnets.data.datasets import Dataset as Dataset
from jaxnets.data.datasets import load as load
from jaxnets.data.order import index as index
