"""Linen modules, each beside the pure function that it wraps."""

from jaxnets.layers.attention import MultiHeadAttention as MultiHeadAttention
from jaxnets.layers.attention import SelfAttention as SelfAttention
from jaxnets.layers.attention import attention as attention
from jaxnets.layers.attention import chunked_attention as chunked_attention
from jaxnets.layers.batch_norm import BatchNorm as BatchNorm
from jaxnets.layers.batch_norm import batch_moments as batch_moments
from jaxnets.layers.conv import Conv as Conv
from jaxnets.layers.conv import conv2d as conv2d
from jaxnets.layers.dropout import Dropout as Dropout
from jaxnets.layers.dropout import dropout as dropout
from jaxnets.layers.embedding import Embedding as Embedding
from jaxnets.layers.embedding import embed as embed
from jaxnets.layers.key_values import KeyValues as KeyValues
from jaxnets.layers.layer_norm import LayerNorm as LayerNorm
from jaxnets.layers.layer_norm import layer_norm as layer_norm
from jaxnets.layers.linear import Linear as Linear
from jaxnets.layers.recurrent import GRU as GRU
from jaxnets.layers.recurrent import LSTM as LSTM
from jaxnets.layers.rotary import rotate as rotate
from jaxnets.ops.partition import constrain as constrain
