"""Models, one file for each family, all called with `x, train=..., rows=..., mask=...`.

x are images, tokens for language models and text encoders, both sides of a translation, or pairs of user
and item for recommenders.
"""

from jaxnets.models.attention_rnn import AttentionRNN as AttentionRNN
from jaxnets.models.bert import BERT as BERT
from jaxnets.models.convnet import convnet as convnet
from jaxnets.models.functional import functional as functional
from jaxnets.models.generation import Sampling as Sampling
from jaxnets.models.generation import generate as generate
from jaxnets.models.generation import stream as stream
from jaxnets.models.gpt import GPT as GPT
from jaxnets.models.gpt import gpt as gpt
from jaxnets.models.gpt import gpt2_small as gpt2_small
from jaxnets.models.gpt import gpt_100m as gpt_100m
from jaxnets.models.lenet import lenet as lenet
from jaxnets.models.matrix_factorization import embedding_dot as embedding_dot
from jaxnets.models.matrix_factorization import matrix_factorization as matrix_factorization
from jaxnets.models.mlp import mlp as mlp
from jaxnets.models.neumf import neumf as neumf
from jaxnets.models.speednet import whiten_params as whiten_params
from jaxnets.models.speednet import whitened as whitened
from jaxnets.models.text_classifier import lstm_classifier as lstm_classifier
from jaxnets.models.text_classifier import weighted_naive_bayes as weighted_naive_bayes
from jaxnets.models.text_classifier import with_ratios as with_ratios
from jaxnets.models.transformer import Transformer as Transformer
from jaxnets.models.two_tower import two_tower as two_tower
