"""Draws `Dots`: one value for each candidate, with its error, beside a line at zero."""

import math
from xml.etree.ElementTree import Element

from wsm_ds.reporting.report.document import Dots, Row
from wsm_ds.reporting.report.drawing.elements import (
    BOLD_PX,
    LETTER_PX,
    add,
    canvas,
    clipped,
    marker,
    number,
    places_of_labels,
)
from wsm_ds.reporting.report.drawing.scale import Scale, span_of, tick_words, ticks, without_far
from wsm_ds.reporting.report.numbers import value_words

LABELS_FROM = 500.0
"""Width in pixels from which on names stand beside the points, and no longer above them."""


def draw_dots(dots: Dots, width: float) -> Element:
    """Draws one line for each candidate.

    Args:
        dots: one or more rows.
        width: in pixels.
    """
    is_wide = width >= LABELS_FROM
    names = [f"{row.name} ({row.mark})" if row.mark else row.name for row in dots.rows]
    labels = min(max(map(len, names)) * BOLD_PX + 20, width * 0.4) if is_wide else 14.0
    each, top = (24.0, 6.0) if is_wide else (40.0, 6.0)
    bottom = top + each * len(dots.rows)
    svg = canvas(width, bottom + 50, f"{dots.title}. {dots.x_label}.")
    x = Scale(*_span(dots), labels, width - 14)
    _axis(svg, dots, x, top, bottom, width)
    for place, (row, name) in enumerate(zip(dots.rows, names, strict=True)):
        y = top + each * (place + (0.5 if is_wide else 0.72))
        style = "row strong" if row.mark else "row"
        if is_wide:
            words = clipped(name, (labels - 16) * LETTER_PX / BOLD_PX)
            label = add(svg, "text", words, class_=style, x=labels - 12, y=y + 4.5, text_anchor="end")
        else:
            label = add(svg, "text", clipped(name, (width - 16) * LETTER_PX / BOLD_PX), class_=style, x=8, y=y - 12)
        add(label, "title", name)
        _dot(svg, row, x, y)
    return svg


def _finite(error: float | None) -> float:
    return error if error is not None and math.isfinite(error) else 0.0


def _span(dots: Dots) -> tuple[float, float]:
    kept = set(without_far([row.value for row in dots.rows], "less"))
    rows = [row for row in dots.rows if row.value in kept]
    return span_of([0.0, *(row.value + sign * _finite(row.error) for row in rows for sign in (-1, 1))], 0.05)


def _axis(svg: Element, dots: Dots, x: Scale, top: float, bottom: float, width: float) -> None:
    values = ticks(x.low, x.high, max(int((x.end - x.start) / 80), 2))
    words = tick_words(values)
    fits = places_of_labels([x(value) for value in values], words, 0, width)
    for value, text, is_shown in zip(values, words, fits, strict=True):
        add(
            svg,
            "path",
            class_="zero" if value == 0 else "grid",
            d=f"M{number(x(value))} {number(top)}V{number(bottom)}",
        )
        if is_shown:
            add(svg, "text", text, class_="tick", x=x(value), y=bottom + 18, text_anchor="middle")
    words_px = LETTER_PX * len(dots.x_label)
    middle = max(min((x.start + x.end) / 2, width - words_px / 2 - 4), words_px / 2 + 4)
    add(svg, "text", dots.x_label, class_="label", x=middle, y=bottom + 40, text_anchor="middle")


def _dot(svg: Element, row: Row, x: Scale, y: float) -> None:
    group = add(svg, "g", class_=row.color)
    words = f"{row.name}: {value_words(row.value, row.error)}"
    if not x.holds(row.value):
        tip = add(group, "path", class_="mark", d=f"M{number(x.end)} {number(y)}l-9 5v-10z")
        add(tip, "title", words)
        add(group, "text", f"{row.value:.4g}", class_="name", x=x.end - 14, y=y + 4.5, text_anchor="end")
        return
    half = _finite(row.error)
    if half:
        ends = x(row.value - half), x(row.value + half)
        add(group, "path", class_="error", d=f"M{number(ends[0])} {number(y)}H{number(ends[1])}"
            f"M{number(ends[0])} {number(y - 3)}v6M{number(ends[1])} {number(y - 3)}v6")  # fmt: skip
    marker(group, row.color, x(row.value), y, words)
    if row.mark:
        add(svg, "circle", class_="ring", cx=x(row.value), cy=y, r=9.0)
