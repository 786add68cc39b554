"""Hooks of mkdocs: the pages work as plain Markdown in the repository, and as a site.

Links out of docs/ lead nowhere in the site. Three such pages become pages of the site; other links become their text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"launch/README.md": "launch.md", "benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository → pages of the site."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie outside docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository: to the page that the site has of them, or else only their text."""
    origins = {name: source for source, name in PAGES.items()}
    source = origins.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def site_link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor})"
        if path.startswith("docs/") and Path(path).suffix != ".py":
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return text

    return LINK.sub(site_link, markdown)
