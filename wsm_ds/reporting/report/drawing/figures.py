"""Draws a figure of any kind, for a wide and for a narrow page."""

from xml.etree.ElementTree import Element, tostring

from wsm_ds.reporting.report.document import Bar, Dots, Figure, HeatMap, Plot
from wsm_ds.reporting.report.drawing.areas import draw_bar, draw_heat_map
from wsm_ds.reporting.report.drawing.dots import draw_dots
from wsm_ds.reporting.report.drawing.plots import draw_plot

WIDE_PX, NARROW_PX = 880.0, 328.0
"""Widths of the two drawings. A page shows one of them, so letters have the same size on a desk and on a phone."""


def draw(figure: Figure, width: float) -> str:
    """Returns a drawing as SVG, to be put into HTML.

    Args:
        figure: the data.
        width: in pixels.
    """
    return tostring(_element(figure, width), encoding="unicode")


def _element(figure: Figure, width: float) -> Element:
    if isinstance(figure, Plot):
        return draw_plot(figure, width)
    if isinstance(figure, Dots):
        return draw_dots(figure, width)
    if isinstance(figure, HeatMap):
        return draw_heat_map(figure, width)
    if isinstance(figure, Bar):
        return draw_bar(figure, width)
    raise TypeError(f"no drawing for a {type(figure).__name__}")
