"""A functional deep-learning library on JAX."""

from jaxnets.version import __version__ as __version__
