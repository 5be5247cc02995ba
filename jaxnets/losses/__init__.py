"""Pure losses: one number for each example or element, never a mean."""

from jaxnets.losses.classification import chunked_cross_entropy as chunked_cross_entropy
from jaxnets.losses.classification import sigmoid_cross_entropy as sigmoid_cross_entropy
from jaxnets.losses.classification import softmax_cross_entropy as softmax_cross_entropy
from jaxnets.losses.regression import huber as huber
from jaxnets.losses.regression import squared_error as squared_error
