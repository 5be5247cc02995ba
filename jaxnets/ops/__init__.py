"""Pure array functions that several packages share."""

from jaxnets.ops.activation import gelu as gelu
from jaxnets.ops.convolution import convolve as convolve
from jaxnets.ops.forms import plain as plain
from jaxnets.ops.hash import row_bits as row_bits
from jaxnets.ops.images import NUM_VIEWS as NUM_VIEWS
from jaxnets.ops.images import image_views as image_views
from jaxnets.ops.images import normalize_images as normalize_images
from jaxnets.ops.images import resize_images as resize_images
from jaxnets.ops.partition import constrain as constrain
from jaxnets.ops.partition import data_axis as data_axis
from jaxnets.ops.partition import data_sum as data_sum
from jaxnets.ops.pooling import avg_pool as avg_pool
from jaxnets.ops.pooling import max_pool as max_pool
from jaxnets.ops.product import add_bias as add_bias
from jaxnets.ops.product import product as product
from jaxnets.ops.recurrent import gru as gru
from jaxnets.ops.recurrent import lstm as lstm
from jaxnets.ops.recurrent import lstm_of_input as lstm_of_input
