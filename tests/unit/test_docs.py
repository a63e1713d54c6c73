"""What the documentation points at exists: links, files, and the names of docs/architecture.md."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "plugins/*.md", "benchmarks/*.md", "examples/*/*.md")
    for page in REPOSITORY.glob(pattern)
)
CODE_SPAN = re.compile(r"`([^`\n]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_exist(page):
    in_repository = re.compile(r"(?:rlsys|tests|scripts|examples|benchmarks|docs)/[\w./-]+\.\w+")
    named = set(in_repository.findall(re.sub(r"https?://\S+", "", page.read_text())))
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


def test_names_in_the_architecture_are_in_the_code():
    sources = "\n".join(path.read_text() for path in REPOSITORY.glob("rlsys/**/*.py"))
    words = set(re.findall(r"\w+", sources))
    spans = CODE_SPAN.findall((REPOSITORY / "docs/architecture.md").read_text())
    names = {
        word
        for span in spans
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span) and not span.endswith(".py")
        for word in span.partition("(")[0].split(".")
    }
    assert len(names) > 40
    assert sorted(names - words) == []
