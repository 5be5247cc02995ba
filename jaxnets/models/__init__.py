"""Models, one file for each family, all called with `image, train=..., rows=..., mask=...`."""

from jaxnets.models.convnet import convnet as convnet
from jaxnets.models.functional import functional as functional
from jaxnets.models.lenet import lenet as lenet
from jaxnets.models.mlp import mlp as mlp
from jaxnets.models.speednet import whiten_params as whiten_params
from jaxnets.models.speednet import whitened as whitened
