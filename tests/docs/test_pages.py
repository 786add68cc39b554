"""Links lead somewhere, generated pages are those of the code, and what pages say of formats is so."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from docs.pages import DOCS, PAGES, ROOT, blocks

from wsm_ds import merge
from wsm_ds.planning.recipe import MergeRecipe

LINKED = [*PAGES, ROOT / "launch/README.md", ROOT / "benchmarks/README.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", flags=re.MULTILINE | re.DOTALL)


def script(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.torch  # the page of the Python interface describes WSMLR
def test_generated_pages_are_what_the_code_says() -> None:
    for path, text in script("generate").pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run python docs/generate.py: {path} is out of date"


def test_the_figure_is_drawn_from_the_data_beside_it() -> None:
    figure = script("figure")
    data = json.loads(figure.DATA.read_text())
    assert figure.draw(data) == figure.DATA.with_suffix(".svg").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    navigation = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    ours = {page.name for page in DOCS.glob("*.md")}
    assert sorted(navigation) == sorted(ours | set(script("hooks").PAGES.values()))


def test_the_manifest_page_names_every_key_of_a_manifest(runs: Path, tmp_path: Path) -> None:
    merge(run=runs / "w2_s2_bf16", last=2, curve="linear", out=tmp_path / "out")
    manifest = json.loads((tmp_path / "out/wsm_merge.json").read_text())
    page = DOCS / "manifest-format.md"
    (block,) = blocks(page, "json")
    example = json.loads(block.text)
    assert list(example) == list(manifest)
    assert set(example["sources"][0]) == set(manifest["sources"][0])
    assert {*example["files"]["latest"]} == {*manifest["files"]["latest"]}
    assert set(example["recipe"]) <= set(MergeRecipe.model_fields)
    assert example["format"] == manifest["format"]
    rows = re.findall(r"^\| (`.*?`) \|", page.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(manifest)


def test_the_picture_of_the_packages_is_that_of_the_imports() -> None:
    page = DOCS / "architecture.md"
    lines = [re.split(r" {3,}", line.strip())[0] for line in blocks(page, "text")[1].text.splitlines()]
    level = {name: number for number, line in enumerate(lines) for name in line.split(" · ") if line.strip("│▼")}
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(level) == sorted(name for name, _ in rows)
    for name, imported in rows:
        assert all(level[other] >= level[name] for other in imported.split(", ") if other), name
