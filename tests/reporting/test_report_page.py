"""What the page and its Markdown twin say, and that no name of a file becomes a part of them."""

import re
from collections import Counter
from html.parser import HTMLParser

from made_results import ENDS, HOSTILE, WINDOWS, made_tuning

from wsm_ds.errors import one_line
from wsm_ds.evaluation.evaluation import Metric
from wsm_ds.reporting.report.document import HeatMap, Plot
from wsm_ds.reporting.report.figures import difference_dots, heat_map, run_plot, window_plot
from wsm_ds.reporting.report.markdown import markdown
from wsm_ds.reporting.report.page import html
from wsm_ds.reporting.report.sections import document
from wsm_ds.reporting.report.selection import rank
from wsm_ds.tuning.results import TuningResult

CARRIERS = {"src", "href", "action", "onclick", "onload", "srcset", "poster", "data"}


class Page(HTMLParser):
    """Counts elements, and keeps attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.words += data


def hostile(result: TuningResult) -> TuningResult:
    """A tuning with a name that would be harmful, wherever a text can stand."""
    first = result.candidates[0]
    renamed = first.model_copy(
        update={"name": HOSTILE, "curve": HOSTILE, "metrics": first.metrics | {HOSTILE: Metric(value=1)}}
    )
    failed = result.candidates[-1].model_copy(update={"failure": HOSTILE})
    assert result.recommendation is not None
    advice = result.recommendation.model_copy(update={"warnings": (HOSTILE,), "sentence": HOSTILE, "name": HOSTILE})
    others = result.candidates[1:-1]
    return result.model_copy(
        update={"candidates": (renamed, *others, failed), "run": f"/data/{HOSTILE}", "data": HOSTILE,
                "waiting": (HOSTILE,), "recommendation": advice, "seconds": {HOSTILE: 1.0}}
    )  # fmt: skip


def test_the_page_asks_nobody_for_anything_and_runs_nothing() -> None:
    text = html(document(made_tuning()))
    page = Page(text)
    assert page.elements["script"] == page.elements["link"] == page.elements["img"] == page.elements["iframe"] == 0
    assert not page.attributes & CARRIERS
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text


def test_a_name_of_a_file_is_only_text() -> None:
    page = Page(html(document(hostile(made_tuning()))))
    plain = Page(html(document(made_tuning())))
    assert page.elements["script"] == 0
    assert set(page.elements) == set(plain.elements)
    assert page.attributes <= plain.attributes
    assert one_line(HOSTILE) in page.words
    assert "\x1b" not in page.words


def test_markdown_keeps_its_tables_whatever_a_name_holds() -> None:
    text = markdown(document(hostile(made_tuning())))
    assert "<script" not in text
    assert "\x1b" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_page_and_twin_hold_every_candidate_and_the_recommendation() -> None:
    result = made_tuning()
    made = document(result)
    page, twin = Page(html(made)).words.replace("\xa0", " "), markdown(made).replace("\\", "")
    assert result.recommendation is not None
    for text in (page, twin):
        assert all(candidate.name in text for candidate in result.candidates)
        assert result.recommendation.sentence in text
        assert "exit code 137, three times" in text
        assert "last8-linear@20000 (recommended)" in text
        assert "3.140 ± 0.012" in text


def test_the_same_tuning_gives_the_same_bytes() -> None:
    assert html(document(made_tuning())) == html(document(made_tuning()))


def test_the_window_picture_shows_the_merges_of_the_newest_end_a_line_a_curve() -> None:
    plot = window_plot(rank(made_tuning()))
    assert isinstance(plot, Plot)
    assert [series.name for series in plot.series] == ["linear", "1-sqrt", "cosine"]
    assert [point.x for point in plot.series[0].points] == [n * 250 * 4e6 for n in WINDOWS]
    assert {level.name for level in plot.levels} == {"raw step20000", "decayed branch"}
    assert [p.mark for p in plot.series[0].points] == ["", "recommended", "best", ""]


def test_the_heat_map_has_a_cell_for_each_window_and_end() -> None:
    heat = heat_map(rank(made_tuning()))
    assert isinstance(heat, HeatMap)
    assert heat.columns == ("64B", "72B", "80B")
    assert heat.rows == ("4B (4)", "8B (8)", "16B (16)", "32B (32)")
    by_name = {candidate.name: candidate for candidate in made_tuning().candidates}
    assert heat.cells[1][2] == by_name["last8-linear@20000"].metrics["loss"].value


def test_the_picture_along_the_run_has_raw_and_merged_at_the_same_places() -> None:
    plot = run_plot(rank(made_tuning()))
    assert plot is not None
    assert [series.name for series in plot.series][:3] == ["raw checkpoints", "last 8, linear", "last 16, linear"]
    assert [point.x for point in plot.series[1].points] == [end * 4e6 for end in ENDS]
    assert {point.x for point in plot.series[1].points} <= {point.x for point in plot.series[0].points}


def test_a_tuning_of_one_end_shows_its_choice_among_the_raw_checkpoints() -> None:
    result = made_tuning()
    kept = [c for c in result.candidates if c.end is None or c.kind == "raw" or c.end.steps == ENDS[-1]]
    plot = run_plot(rank(result.model_copy(update={"candidates": tuple(kept)})))
    assert plot is not None
    assert [(series.name, len(series.points)) for series in plot.series] == [
        ("raw checkpoints", 33), ("last 8, linear", 1), ("last 16, linear", 1),
    ]  # fmt: skip


def test_the_differences_show_the_best_the_raw_one_and_the_baseline() -> None:
    dots = difference_dots(rank(made_tuning()))
    assert dots is not None
    names = [row.name for row in dots.rows]
    assert names[0] == "last16-linear@20000"
    assert {"step20000", "decayed branch", "last8-linear@20000"} <= set(names)
    assert len(names) <= 20


def test_a_single_measurement_gives_a_page_without_pictures_of_comparison() -> None:
    result = made_tuning()
    alone = result.model_copy(update={"candidates": result.candidates[:1], "recommendation": None, "seconds": {}})
    page = Page(html(document(alone)))
    assert result.candidates[0].name in page.words
    assert "No recommendation" in page.words


def test_a_tuning_that_has_measured_nothing_says_so() -> None:
    empty = TuningResult(run="/data/run", metric="loss", waiting=("a", "b"))
    assert "Nothing is measured yet" in Page(html(document(empty))).words
    assert "2 candidates not measured yet (a, b)" in markdown(document(empty)).replace("\\", "")
