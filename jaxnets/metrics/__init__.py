"""Metrics that merge exactly over parts of a batch, devices and batches."""

from jaxnets.metrics.bleu import BLEU as BLEU
from jaxnets.metrics.classification import is_correct as is_correct
from jaxnets.metrics.mean import Mean as Mean
