"""What the pages need on their way from the repository to the site (mkdocs.yml: hooks).

The pages are written for GitHub: README.md, docs/ and what they link to. Here README.md becomes index.md, a page keeps its
path without `docs/`, and whatever else a page links to comes along: Markdown as a page, other text as a page that shows it.
GitHub's Markdown and Python-Markdown differ where lists and tables begin and in how far lists are indented.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
ITEM = re.compile(r"( *)([-*+]|\d+[.)])( +)(?=\S)")
RULE = re.compile(r"\|?[ :]*-[ :|-]*$")
ORIGIN: dict[str, str] = {}  # path in the site -> path in the repository, of pages and of what they link to


def on_files(files: Any, config: Any) -> Any:
    """README.md as index.md, and what pages link to outside docs/."""
    ORIGIN.clear()
    ORIGIN.update({file.src_uri: f"docs/{file.src_uri}" for file in files})
    wanted = ["README.md", *(ORIGIN[file.src_uri] for file in files if file.src_uri.endswith(".md"))]
    for origin in wanted:
        if page_of(origin) not in ORIGIN:
            ORIGIN[page_of(origin)] = origin
            files.append(File.generated(config, page_of(origin), content=shown(origin)))
        if origin.endswith(".md"):
            wanted += [to for to in targets(origin) if page_of(to) not in ORIGIN and to not in wanted]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them; lists and tables as Python-Markdown reads them."""
    here, origin = page.file.src_uri, ORIGIN[page.file.src_uri]
    if not origin.endswith(".md"):
        return markdown

    def moved(found: re.Match[str]) -> str:
        to = posixpath.relpath(page_of(resolved(origin, found[2])), posixpath.dirname(here) or ".")
        return f"{found[1]}{to}{found[3] or ''})"

    return normal(LINK.sub(moved, markdown))


def resolved(origin: str, link: str) -> str:
    """The file of the repository that a link leads to, from the page `origin`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def page_of(origin: str) -> str:
    """A file's path in the site.

    >>> page_of("README.md"), page_of("docs/fda.md"), page_of("bench/RESULTS.md"), page_of("src/taciturn/round.py")
    ('index.md', 'fda.md', 'bench/RESULTS.md', 'src/taciturn/round.py.md')
    """
    if origin == "README.md":
        return "index.md"
    if origin.startswith("docs/"):
        return origin.removeprefix("docs/")
    return origin if origin.endswith(".md") else f"{origin}.md"


def targets(origin: str) -> list[str]:
    """The files that a page links to."""
    return [resolved(origin, link[1]) for link in LINK.findall((ROOT / origin).read_text())]


def shown(origin: str) -> str:
    """A page that shows a file of the repository."""
    text = (ROOT / origin).read_text()
    return text if origin.endswith(".md") else f"# {origin}\n\n```{PurePosixPath(origin).suffix[1:]}\n{text}```\n"


def normal(markdown: str) -> str:
    """A blank line before a list and a table; four spaces for each level of a list; fenced text as it is.

    >>> print(normal("Two:\\n1. a\\n   ```\\n   x\\n   ```\\n2. b"))
    Two:
    <BLANKLINE>
    1. a
        ```
        x
        ```
    2. b
    """
    out: list[str] = []
    depths: list[int] = []  # where the text of each open list begins
    lines, fence = markdown.split("\n"), ""
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        text, indent, before = line.strip(), len(line) - len(line.lstrip()), (out[-1].strip() if out else "")
        item = None if fence else ITEM.match(line)
        if item or (text and not fence and (not before or text.startswith("#"))):
            while depths and indent < depths[-1]:
                depths.pop()
        level, inner = 4 * len(depths), depths[-1] if depths else 0
        if item:
            if before and not depths and not ITEM.match(out[-1]) and not within(out):
                out.append("")
            depths.append(item.end())
        elif text.startswith("|") and before and not before.startswith("|") and RULE.match(after):
            out.append("")
        out.append(" " * (level + max(0, indent - inner)) + line.lstrip() if depths and text else line)
        if text.startswith("```"):
            fence = "" if fence else "```"
    return "\n".join(out)


def within(out: list[str]) -> bool:
    """Whether the last line belongs to a list already."""
    for line in reversed(out):
        if not line.strip() or line.startswith("#"):
            return False
        if ITEM.match(line):
            return True
    return False
