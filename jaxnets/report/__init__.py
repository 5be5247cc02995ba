"""Pictures and tables from what a run folder holds."""

from jaxnets.report.alignment import draw_alignment as draw_alignment
from jaxnets.report.curves import draw_curves as draw_curves
from jaxnets.report.predictions import draw_predictions as draw_predictions
