"""Pictures and tables from what a run folder holds."""

from jaxnets.report.curves import draw_curves as draw_curves
