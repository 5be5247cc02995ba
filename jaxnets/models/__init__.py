"""Models, one file for each family, all called with `x, train=..., rows=..., mask=...`.

x are images, tokens for language models and text encoders, or both sides of a translation.
"""

from jaxnets.models.attention_rnn import AttentionRNN as AttentionRNN
from jaxnets.models.bert import BERT as BERT
from jaxnets.models.convnet import convnet as convnet
from jaxnets.models.functional import functional as functional
from jaxnets.models.gpt import gpt2_small as gpt2_small
from jaxnets.models.gpt import gpt_100m as gpt_100m
from jaxnets.models.lenet import lenet as lenet
from jaxnets.models.mlp import mlp as mlp
from jaxnets.models.speednet import whiten_params as whiten_params
from jaxnets.models.speednet import whitened as whitened
from jaxnets.models.transformer import Transformer as Transformer
