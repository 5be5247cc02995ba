"""What a model will cost, found out before it runs."""

from jaxnets.plan.layer_table import Layer as Layer
from jaxnets.plan.layer_table import format_table as format_table
from jaxnets.plan.layer_table import layer_table as layer_table
