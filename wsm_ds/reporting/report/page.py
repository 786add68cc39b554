"""Makes the HTML page of a report: one file, without scripts, that asks no server for anything."""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from wsm_ds import __version__
from wsm_ds.errors import one_line
from wsm_ds.reporting.report.document import Document, Figure
from wsm_ds.reporting.report.drawing.figures import NARROW_PX, WIDE_PX, draw

GENERATOR = f"wsm-ds report {__version__}"
"""The page's generator. It begins with `MADE_BY`."""
MADE_BY = "wsm-ds report"
"""By these words a file is known as a report, which a newer report may replace."""


def html(document: Document) -> str:
    """Returns a report as an HTML page.

    Args:
        document: the report. Its texts may hold any characters: all are escaped.
    """
    template = _environment().from_string(_resource("page.html"))
    style = Markup(_resource("page.css").strip())
    return template.render(
        document=document, generator=GENERATOR, style=style, drawing=_drawing, wide=WIDE_PX, narrow=NARROW_PX
    )


def _drawing(figure: Figure, width: float) -> Markup:
    return Markup(draw(figure, width))  # ElementTree has escaped what is in it


def _printable(value: object) -> object:
    if not isinstance(value, str) or isinstance(value, Markup):  # Markup is ours
        return value
    # A name of a file may hold control characters, which no browser shows. A line must not break before an error.
    return one_line(value).replace(" ± ", "\xa0±\xa0")


@cache
def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, finalize=_printable, keep_trailing_newline=True)


@cache
def _resource(name: str) -> str:
    return (files("wsm_ds.reporting.report") / "templates" / name).read_text(encoding="utf-8")
