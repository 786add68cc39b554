"""Makes the Markdown twin of a report: the same sections, with tables where the page has pictures."""

import re
from collections.abc import Sequence

from wsm_ds.errors import one_line
from wsm_ds.reporting.report.document import Bar, Document, Dots, Figure, HeatMap, Plot, Table
from wsm_ds.reporting.report.numbers import decimals_for, difference_words, value_words
from wsm_ds.reporting.report.page import GENERATOR
from wsm_ds.tuning.results import Difference


def markdown(document: Document) -> str:
    """Returns a report as Markdown.

    Args:
        document: the report. What means something in Markdown or HTML is escaped in its texts.
    """
    lines = [f"<!-- made by {GENERATOR} -->", "", f"# {_text(document.title)}", "", _text(document.lead), ""]
    lines += [f"- {_text(name)}: {_text(value)}" for name, value in document.facts]
    for section in document.sections:
        lines += ["", f"## {_text(section.heading)}"]
        for note in section.notes:
            lines += ["", f"> **Warning.** {_text(note)}"]
        for paragraph in section.text:
            lines += ["", _text(paragraph)]
        if section.code:
            lines += ["", "```sh", one_line(section.code), "```"]
        if section.table is not None:
            lines += ["", *_table(section.table.header, section.table.rows, section.table.strong)]
        if section.table is None or not section.table.is_detail:
            for figure in section.figures:
                lines += _figure(figure)
    return "\n".join([*lines, ""])


def _figure(figure: Figure) -> list[str]:
    table = _figure_table(figure)
    return ["", f"**{_text(figure.title)}**", "", *_table(table.header, table.rows, table.strong)]


def _figure_table(figure: Figure) -> Table:
    """The values of a figure."""
    if isinstance(figure, Plot):
        return _plot_table(figure)
    if isinstance(figure, Dots):
        cells = [
            (row.name, difference_words(Difference(value=row.value, error=row.error)), row.mark) for row in figure.rows
        ]
        return Table(("candidate", figure.x_label, ""), tuple(cells))
    if isinstance(figure, HeatMap):
        decimals = decimals_for([value for row in figure.cells for value in row if value is not None])
        rows = [
            (name, *("-" if value is None else f"{value:.{decimals}f}" for value in row))
            for name, row in zip(figure.rows, figure.cells, strict=True)
        ]
        return Table((f"{figure.y_label} / {figure.x_label}", *figure.columns), tuple(rows))
    if isinstance(figure, Bar):
        return Table(("kind", "time"), tuple((name, words) for name, _, words in figure.parts))
    raise TypeError(f"no table for a {type(figure).__name__}")


def _plot_table(plot: Plot) -> Table:
    positions = sorted({point.x for series in plot.series for point in series.points})
    decimals = 6 if plot.best == "" else decimals_for([point.y for series in plot.series for point in series.points])
    columns = [
        {point.x: value_words(point.y, point.error, decimals) for point in series.points} for series in plot.series
    ]
    rows = [(_position(x), *(column.get(x, "-") for column in columns)) for x in positions]
    rows += [
        (level.name, value_words(level.y, level.error, decimals), *[""] * (len(columns) - 1)) for level in plot.levels
    ]
    return Table((plot.x_label, *(series.name or plot.y_label for series in plot.series)), tuple(rows))


def _position(x: float) -> str:
    return f"{x:,.0f}" if x == round(x) else f"{x:,.6g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], strong: frozenset[int]) -> list[str]:
    lines = ["| " + " | ".join(map(_text, header)) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    for number, row in enumerate(rows):
        cells = [f"**{_text(cell)}**" if number in strong and cell else _text(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _text(words: str) -> str:
    """Escapes what Markdown or HTML would read as a sign of theirs."""
    escaped = one_line(words).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)
