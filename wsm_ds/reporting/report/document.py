"""What a report holds, as plain data: sections with text, figures and tables. HTML and Markdown are made from it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Point:
    """A measured value in a figure.

    Attributes:
        x: position, in the unit of the x axis.
        y: value.
        error: standard error of `y`; None: not known.
        words: what the point is, shown when the pointer rests on it.
        mark: a label beside the point, such as "recommended"; "" for most.
    """

    x: float
    y: float
    error: float | None = None
    words: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend.
        points: by rising x.
        color: class of the color, "s0" to "s5", "raw" or "baseline".
        form: how they are drawn.
    """

    name: str
    points: tuple[Point, ...]
    color: str
    form: Literal["line", "points", "stems"] = "line"


@dataclass(frozen=True)
class Level:
    """A horizontal line: a value that all others are compared with.

    Attributes:
        name: in the legend.
        y: value.
        error: standard error of `y`, drawn as a band; None: not known.
        color: class of the color, as in `Series`.
    """

    name: str
    y: float
    error: float | None
    color: str


@dataclass(frozen=True)
class Plot:
    """Values against a length or a position.

    Attributes:
        title: what it shows.
        x_label: name and unit of the x axis.
        y_label: name and unit of the y axis.
        series: at most six and the raw checkpoints.
        levels: horizontal lines.
        is_log: whether the x axis is logarithmic; then all x are positive.
        best: whether "less" or "more" is better; "" if neither: then the y axis begins at zero.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    is_log: bool = False
    best: Literal["less", "more", ""] = "less"


@dataclass(frozen=True)
class Row:
    """A line of `Dots`.

    Attributes:
        name: of the candidate.
        value: its value.
        error: standard error of `value`; None: not known.
        color: class of the color, as in `Series`.
        mark: such as "recommended"; "" for most.
    """

    name: str
    value: float
    error: float | None
    color: str
    mark: str = ""


@dataclass(frozen=True)
class Dots:
    """One value for each candidate, in lines with a common x axis, and a line at zero.

    Attributes:
        title: what it shows.
        x_label: name and unit of the x axis.
        rows: from top to bottom.
    """

    title: str
    x_label: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class HeatMap:
    """A value for each pair of two properties.

    Attributes:
        title: what it shows.
        x_label, y_label: names of the properties.
        columns, rows: their values, in words.
        cells: [rows][columns]; None: not measured.
        best: whether "less" or "more" is better: the better a cell, the darker it is.
    """

    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    best: Literal["less", "more"]


@dataclass(frozen=True)
class Bar:
    """Shares of a whole.

    Attributes:
        title: what it shows.
        parts: name, value and the value in words of each share.
    """

    title: str
    parts: tuple[tuple[str, float, str], ...]


Figure = Plot | Dots | HeatMap | Bar


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: names of the columns.
        rows: cells, as many in each row as in `header`.
        strong: numbers of the rows that stand out.
        is_detail: whether it only repeats a figure; the page shows it on request.
        is_prose: whether the cells are sentences, no numbers.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    is_detail: bool = False
    is_prose: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        heading: its title.
        text: paragraphs.
        notes: warnings, one sentence or more each.
        figures: pictures.
        table: None for most.
        code: a command to copy; "" for most.
    """

    heading: str
    text: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    table: Table | None = None
    code: str = ""


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: of the page.
        lead: the most important sentence.
        facts: names and values, such as ("metric", "loss, nats/token").
        sections: the parts.
    """

    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
