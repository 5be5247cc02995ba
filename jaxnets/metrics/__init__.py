"""Metrics that merge exactly over parts of a batch, devices and batches."""

from jaxnets.metrics.auc import AUC as AUC
from jaxnets.metrics.bleu import BLEU as BLEU
from jaxnets.metrics.classification import is_correct as is_correct
from jaxnets.metrics.counts import ClassCounts as ClassCounts
from jaxnets.metrics.mean import Mean as Mean
from jaxnets.metrics.perplexity import Perplexity as Perplexity
from jaxnets.metrics.ranking import gain_at as gain_at
from jaxnets.metrics.ranking import is_hit as is_hit
from jaxnets.metrics.ranking import ndcg as ndcg
from jaxnets.metrics.ranking import rank_of as rank_of
from jaxnets.metrics.ranking import reciprocal_rank as reciprocal_rank
from jaxnets.metrics.regression import RootMeanSquare as RootMeanSquare
from jaxnets.metrics.regression import absolute_error as absolute_error
