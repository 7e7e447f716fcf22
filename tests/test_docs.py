"""What the documents name exists: links, files of the code, a page for every method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nogemm.config import layer_class, layer_kinds

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("docs/**/*.md"),
        *(
            ROOT / name
            for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/README.md")
        ),
    ]
)


def broken(page: Path) -> list[str]:
    """List the relative links of a page that lead nowhere."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    paths = [link.partition("#")[0] for link in links if "://" not in link]
    return [path for path in paths if path and not (page.parent / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](page.md#part) [b](gone.md) [c](https://example.org/x)")
    assert broken(page) == ["gone.md"]


def test_the_developers_page_names_files_that_exist() -> None:
    text = (ROOT / "docs/developers.md").read_text(encoding="utf-8")
    named = [name for name in re.findall(r"`([^`\s]+)`", text) if name.startswith(("src/", "csrc/"))]
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_method_has_a_page() -> None:
    pages = " ".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/reference/methods/*.md"))
    assert [kind for kind in layer_kinds() if layer_class(kind).__name__ not in pages] == []
