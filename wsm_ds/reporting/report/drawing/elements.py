"""Elements of SVG. The text of a user goes through ElementTree, which escapes it."""

from collections.abc import Sequence
from itertools import pairwise
from xml.etree.ElementTree import Element, SubElement

from wsm_ds.errors import one_line

LETTER_PX, BOLD_PX = 7.0, 9.4
"""Width of a letter at 13 pixels, on average and rounded up; there is no way to measure text without a browser."""


def number(value: float) -> str:
    """A length in pixels, with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def add(parent: Element, name: str, words: str = "", **attributes: float | str) -> Element:
    """Adds an element.

    Args:
        parent: takes it.
        name: of the element.
        words: its text.
        **attributes: "_" at the end of a name is dropped, another "_" becomes "-"; numbers are pixels.

    Returns:
        The new element.
    """
    texts = {
        key.rstrip("_").replace("_", "-"): value if isinstance(value, str) else number(value)
        for key, value in attributes.items()
    }
    element = SubElement(parent, name, texts)
    if words:
        element.text = one_line(words)
    return element


def canvas(width: float, height: float, title: str) -> Element:
    """An empty drawing.

    Args:
        width: in pixels. The drawing shrinks with its place on the page, and does not grow.
        height: in pixels.
        title: what it shows, for those who cannot see it.
    """
    size = f"0 0 {number(width)} {number(height)}"
    svg = Element("svg", {"viewBox": size, "width": number(width), "role": "img", "aria-label": one_line(title)})
    svg.set("class", "wide" if width >= 500 else "narrow")
    return svg


def clipped(words: str, width: float) -> str:
    """Text that fits into a width in pixels; "…" stands for what is left out in the middle.

    >>> clipped("last8-linear", 200), clipped("last128-cosine-qam", 70)
    ('last8-linear', 'last1…-qam')
    """
    most = max(int(width / LETTER_PX), 4)
    if len(words) <= most:
        return words
    head = most // 2
    return f"{words[:head]}…{words[len(words) - (most - 1 - head) :]}"


def marker(parent: Element, shape: str, x: float, y: float, words: str) -> None:
    """Adds the sign of a point. Its shape tells the series apart where the color cannot.

    Args:
        parent: takes it; its class gives the color.
        shape: class of the color, see `document.Series`.
        x: its place in pixels, from the left.
        y: its place in pixels, from the top.
        words: shown when the pointer rests on it.
    """
    r = 4.5
    shapes: dict[str, Sequence[tuple[float, float]]] = {
        "s1": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "s2": ((0, -1.25), (1.1, 0.9), (-1.1, 0.9)),
        "s3": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        "s4": ((0, 1.25), (1.1, -0.9), (-1.1, -0.9)),
        "s5": ((-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)),
    }
    if shape in shapes:
        corners = "L".join(f"{number(x + r * dx)} {number(y + r * dy)}" for dx, dy in shapes[shape])
        sign = add(parent, "path", class_="mark", d=f"M{corners}Z")
    else:
        sign = add(parent, "circle", class_="mark" if shape != "raw" else "mark hollow", cx=x, cy=y, r=r)
    if words:
        add(sign, "title", words)


def legend(parent: Element, entries: Sequence[tuple[str, str, str]], left: float, width: float, top: float) -> float:
    """Adds names beside their signs, in as many lines as they need.

    Args:
        parent: takes them.
        entries: name, class of the color, and "line", "points" or "level" of each.
        left: where the lines begin, in pixels.
        width: of the lines, in pixels.
        top: of the first line.

    Returns:
        Where the last line ends.
    """
    x, y = left, top
    for name, color, form in entries:
        words = clipped(name, width - 34)
        needed = 34 + LETTER_PX * len(words)
        if x > left and x + needed > left + width:
            x, y = left, y + 20
        group = add(parent, "g", class_=color)
        if form != "points":
            add(group, "path", class_="level" if form == "level" else "line", d=f"M{number(x)} {number(y + 8)}h24")
        if form != "level":
            marker(group, color, x + 12, y + 8, "")
        add(group, "text", words, class_="name", x=x + 30, y=y + 12.5)
        x += needed + 10
    return y + 20


def places_of_labels(places: Sequence[float], words: Sequence[str], low: float, high: float) -> list[bool]:
    """Says which labels of an axis fit beside each other, from the left.

    Args:
        places: of the middles, in pixels, rising.
        words: the labels.
        low: where the drawing begins, in pixels; no label reaches beyond.
        high: where it ends.
    """
    fits, end = [], low - 6
    for place, text in zip(places, words, strict=True):
        half = LETTER_PX * len(text) / 2
        fits.append(place - half >= end + 6 and place + half <= high + 2)
        end = place + half if fits[-1] else end
    return fits


def steps_path(points: Sequence[tuple[float, float]]) -> str:
    """The path of a line through points, in pixels."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def gaps(places: Sequence[float]) -> float:
    """The smallest distance of neighbours, in pixels; infinite for fewer than two."""
    return min((b - a for a, b in pairwise(sorted(set(places)))), default=float("inf"))
