"""Metrics that merge exactly over parts of a batch, devices and batches."""

from jaxnets.metrics.classification import is_correct as is_correct
from jaxnets.metrics.mean import Mean as Mean
from jaxnets.metrics.perplexity import Perplexity as Perplexity
