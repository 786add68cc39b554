"""Draws `HeatMap` and `Bar`."""

import math
from xml.etree.ElementTree import Element

from wsm_ds.reporting.report.document import Bar, HeatMap
from wsm_ds.reporting.report.drawing.elements import BOLD_PX, LETTER_PX, add, canvas, clipped, legend
from wsm_ds.reporting.report.drawing.scale import without_far
from wsm_ds.reporting.report.numbers import decimals_for

CELL_PX = 34.0
"""Height of a cell."""
FAINTEST, STRONGEST = 0.06, 0.62
"""Opacity of the worst and the best cell; a text can be read on both."""


def draw_heat_map(heat: HeatMap, width: float) -> Element:
    """Draws a cell for each pair: the better, the darker.

    Args:
        heat: one or more cells with a value.
        width: in pixels.
    """
    left = min(max(map(len, heat.rows)) * LETTER_PX + 16, width * 0.35)
    each = min((width - left - 8) / len(heat.columns), 110.0)
    top, bottom = 26.0, 26.0 + CELL_PX * len(heat.rows)
    svg = canvas(width, bottom + 48, heat.title)
    add(svg, "text", heat.y_label, class_="label", x=8, y=14)
    values = [value for row in heat.cells for value in row if value is not None]
    shown = without_far(values, heat.best)
    decimals = decimals_for(shown)
    has_words = max(len(f"{value:.{decimals}f}") for value in shown) * BOLD_PX + 4 <= each
    for number, (name, cells) in enumerate(zip(heat.rows, heat.cells, strict=True)):
        y = top + CELL_PX * number
        add(svg, "text", clipped(name, left - 12), class_="row", x=left - 10, y=y + 22, text_anchor="end")
        for column, value in enumerate(cells):
            place = left + each * column
            share = _share(value, shown, heat.best)
            group = add(svg, "g", class_="heat")
            cell = add(group, "rect", class_="cell" if value is not None else "cell missing", x=place + 1, y=y + 1,
                       width=each - 2, height=CELL_PX - 2, rx=3.0, fill_opacity=f"{share:.3f}")  # fmt: skip
            words = "not measured" if value is None else f"{value:.{decimals + 1}f}"
            add(cell, "title", f"{heat.columns[column]}, {name}: {words}")
            if value is not None and has_words:
                is_best = value == (min(values) if heat.best == "less" else max(values))
                text = f"{value:.{decimals}f}" if value in shown else f"{value:.3g}"
                add(group, "text", text, class_="row strong" if is_best else "row",
                    x=place + each / 2, y=y + 22, text_anchor="middle")  # fmt: skip
    _columns(svg, heat, left, each, bottom, width)
    return svg


def _share(value: float | None, shown: list[float], best: str) -> float:
    """The opacity of a cell."""
    if value is None:
        return 0.0
    low, high = min(shown), max(shown)
    if high == low:
        return STRONGEST
    share = (high - value if best == "less" else value - low) / (high - low)
    return FAINTEST + min(max(share, 0.0), 1.0) * (STRONGEST - FAINTEST)


def _columns(svg: Element, heat: HeatMap, left: float, each: float, bottom: float, width: float) -> None:
    places = [left + each * (column + 0.5) for column in range(len(heat.columns))]
    widest = max(map(len, heat.columns)) * LETTER_PX + 8
    stride = max(math.ceil(widest / each), 1)
    # Every so many columns have a label, among them the last: the newest end point.
    for place, name in list(zip(places, heat.columns, strict=True))[(len(places) - 1) % stride :: stride]:
        middle = min(place, width - widest / 2)
        add(svg, "text", name, class_="tick", x=middle, y=bottom + 18, text_anchor="middle")
    add(svg, "text", heat.x_label, class_="label", x=left, y=bottom + 40)


def draw_bar(bar: Bar, width: float) -> Element:
    """Draws the shares of a whole beside each other.

    Args:
        bar: one or more parts, each larger than 0.
        width: in pixels.
    """
    words = ", ".join(f"{name} {text}" for name, _, text in bar.parts)
    svg = canvas(width, 80, f"{bar.title}: {words}.")
    total, place = sum(value for _, value, _ in bar.parts), 8.0
    colors = [f"s{number % 6}" for number in range(len(bar.parts))]
    for (name, value, text), color in zip(bar.parts, colors, strict=True):
        share = (width - 16) * value / total
        part = add(add(svg, "g", class_=color), "rect", class_="share", x=place, y=4, width=share, height=26.0)
        add(part, "title", f"{name}: {text}")
        place += share
    entries = [(f"{name} {text}", color, "points") for (name, _, text), color in zip(bar.parts, colors, strict=True)]
    end = legend(svg, entries, 8, width - 16, 40)
    svg.set("viewBox", f"0 0 {width:.0f} {end + 4:.0f}")
    return svg
