"""Draws `Plot`: values against a length or a position, with their errors."""

import math
from xml.etree.ElementTree import Element

from wsm_ds.reporting.report.document import Plot, Point, Series
from wsm_ds.reporting.report.drawing.elements import (
    BOLD_PX,
    LETTER_PX,
    add,
    canvas,
    gaps,
    legend,
    marker,
    number,
    places_of_labels,
    steps_path,
)
from wsm_ds.reporting.report.drawing.scale import Scale, span_of, tick_words, ticks, without_far

RIGHT, BOTTOM = 18.0, 46.0
"""Pixels beside and below the axes."""
DODGE = 5.0
"""Pixels between points of several series at the same x."""
NEAR = 110.0
"""Pixels between two labels that would lie on each other."""
MOST_MARKERS = 60
"""A line of more points has no markers, except those with a mark."""


def draw_plot(plot: Plot, width: float) -> Element:
    """Draws a plot.

    Args:
        plot: one or more points.
        width: in pixels.
    """
    height = 180.0 if plot.best == "" else max(width * 0.44, 270.0)
    svg = canvas(width, height, f"{plot.title}. {plot.y_label} against {plot.x_label}.")
    top = _legend(svg, plot, width) + 30
    height += top - 40
    svg.set("viewBox", f"0 0 {number(width)} {number(height)}")
    y = _y_scale(plot, height - BOTTOM, top)
    words = tick_words(ticks(y.low, y.high, 6))
    left = max(len(word) for word in words) * LETTER_PX + 14
    x = _x_scale(plot, left, width - RIGHT)
    _y_axis(svg, plot, y, left, width - RIGHT)
    _x_axis(svg, plot, x, y, width)
    for level in plot.levels:
        _level(svg, plot, level.y, level.error, level.color, x, y)
    is_dodged = gaps([x(p.x) for series in plot.series for p in series.points]) > 2 * DODGE * len(plot.series)
    shifts = [DODGE * (place - (len(plot.series) - 1) / 2) * is_dodged for place in range(len(plot.series))]
    for series, shift in zip(plot.series, shifts, strict=True):
        _series(svg, series, x, y, shift)
    marked = [
        (point, x(point.x) + shift)
        for series, shift in zip(plot.series, shifts, strict=True)
        for point in series.points
        if point.mark and y.holds(point.y)
    ]
    marked.sort(key=lambda item: y(item[0].y))
    for number_of, (point, place) in enumerate(marked):
        is_above = any(abs(place - other) < NEAR for _, other in marked[number_of + 1 :])
        _mark(svg, point, place, y, (x.start, width - 4), is_above=is_above)
    return svg


def _legend(svg: Element, plot: Plot, width: float) -> float:
    entries: list[tuple[str, str, str]] = [
        (series.name, series.color, series.form) for series in plot.series if series.name
    ]
    entries += [(level.name, level.color, "level") for level in plot.levels]
    return legend(svg, entries, 8, width - 16, 4) if entries else 4.0


def _y_scale(plot: Plot, bottom: float, top: float) -> Scale:
    points = [point for series in plot.series for point in series.points]
    if plot.best == "":
        low, high = min(0.0, *(p.y for p in points)), max(0.0, *(p.y for p in points))
        return Scale(low * 1.12, high * 1.12 if high > low else 1.0, bottom, top)
    shown = set(without_far([p.y for p in points] + [level.y for level in plot.levels], plot.best))
    known = [(p.y, p.error) for p in points if p.y in shown]
    known += [(level.y, None) for level in plot.levels if level.y in shown]
    ends = [y + sign * _finite(error) for y, error in known for sign in (-1, 1)]
    return Scale(*span_of(ends, 0.1), bottom, top)


def _finite(error: float | None) -> float:
    return error if error is not None and math.isfinite(error) else 0.0


def _x_scale(plot: Plot, left: float, right: float) -> Scale:
    values = [point.x for series in plot.series for point in series.points]
    if plot.is_log:
        ratio = (max(values) / min(values)) ** 0.1
        return Scale(min(values) / ratio, max(values) * ratio, left, right, is_log=True)
    return Scale(*span_of(values, 0.04), left, right)


def _y_axis(svg: Element, plot: Plot, y: Scale, left: float, right: float) -> None:
    add(svg, "text", plot.y_label, class_="label", x=8, y=y.end - 12)
    values = ticks(y.low, y.high, 6)
    for value, words in zip(values, tick_words(values), strict=True):
        place = y(value)
        add(svg, "path", class_="grid", d=f"M{number(left)} {number(place)}H{number(right)}")
        add(svg, "text", words, class_="tick", x=left - 7, y=place + 4, text_anchor="end")


def _x_axis(svg: Element, plot: Plot, x: Scale, y: Scale, width: float) -> None:
    bottom = y.start
    add(svg, "path", class_="axis", d=f"M{number(x.start)} {number(bottom)}H{number(x.end)}")
    if plot.best == "":
        add(svg, "path", class_="zero", d=f"M{number(x.start)} {number(y(0))}H{number(x.end)}")
    places = sorted({point.x for series in plot.series for point in series.points})
    # Windows are few, and their lengths are what people look up; along a run, round numbers are.
    values = places if plot.is_log or len(places) <= 6 else ticks(x.low, x.high, max(int(width / 90), 4))
    words = tick_words(values)
    fits = places_of_labels([x(value) for value in values], words, 0, width)
    for value, text, is_shown in zip(values, words, fits, strict=True):
        add(svg, "path", class_="axis", d=f"M{number(x(value))} {number(bottom)}v5")
        if is_shown:
            add(svg, "text", text, class_="tick", x=x(value), y=bottom + 19, text_anchor="middle")
    add(svg, "text", plot.x_label, class_="label", x=(x.start + x.end) / 2, y=bottom + BOTTOM - 8, text_anchor="middle")


def _level(svg: Element, plot: Plot, value: float, error: float | None, color: str, x: Scale, y: Scale) -> None:
    group = add(svg, "g", class_=color)
    half = _finite(error)
    if half and y.holds(value):
        top, bottom = y(value + half), y(value - half)
        add(group, "rect", class_="band", x=x.start, y=top, width=x.end - x.start, height=bottom - top)
    if y.holds(value):
        add(group, "path", class_="level", d=f"M{number(x.start)} {number(y(value))}H{number(x.end)}")
        return
    is_above = value > y.high
    words = f"{'▲' if is_above else '▼'} {value:.5g}"
    add(group, "text", words, class_="name", x=x.end, y=y.end + 4 if is_above else y.start - 8, text_anchor="end")


def _series(svg: Element, series: Series, x: Scale, y: Scale, shift: float) -> None:
    group = add(svg, "g", class_=series.color)
    inside = [point for point in series.points if y.holds(point.y)]
    if series.form == "line" and len(inside) > 1:
        add(group, "path", class_="line", d=steps_path([(x(p.x) + shift, y(p.y)) for p in inside]))
    for point in series.points:
        place = x(point.x) + shift
        if not y.holds(point.y):
            _outside(group, point, place, y)
            continue
        if series.form == "stems":
            add(group, "path", class_="stem", d=f"M{number(place)} {number(y(0))}V{number(y(point.y))}")
        half = _finite(point.error)
        if half and len(series.points) <= MOST_MARKERS:
            ends = y(point.y - half), y(point.y + half)
            add(group, "path", class_="error", d=f"M{number(place)} {number(ends[0])}V{number(ends[1])}"
                f"M{number(place - 3)} {number(ends[0])}h6M{number(place - 3)} {number(ends[1])}h6")  # fmt: skip
        if len(series.points) <= MOST_MARKERS or point.mark:
            marker(group, series.color, place, y(point.y), point.words)


def _outside(group: Element, point: Point, place: float, y: Scale) -> None:
    """A sign at the edge, with the value, of a point that lies far from all others."""
    is_above = point.y > y.high
    edge, down = (y.end, 1) if is_above else (y.start, -1)
    tip = f"M{number(place)} {number(edge)}l5 {9 * down}h-10z"
    add(add(group, "path", class_="mark", d=tip), "title", point.words)
    add(group, "text", f"{point.y:.4g}", class_="name", x=place, y=edge + (22 if is_above else -13),
        text_anchor="middle")  # fmt: skip


def _mark(svg: Element, point: Point, place: float, y: Scale, ends: tuple[float, float], *, is_above: bool) -> None:
    """A ring around a point that stands out, and its label above or below it."""
    half = BOLD_PX * len(point.mark) / 2
    add(svg, "circle", class_="ring", cx=place, cy=y(point.y), r=9.0)
    middle = min(max(place, ends[0] + half), ends[1] - half)
    away = _error_px(point, y)
    label = y(point.y) - away - 14 if is_above else min(y(point.y) + away + 24, y.start - 4)
    add(svg, "text", point.mark, class_="callout", x=middle, y=label, text_anchor="middle")


def _error_px(point: Point, y: Scale) -> float:
    return abs(y(point.y) - y(point.y + _finite(point.error)))
