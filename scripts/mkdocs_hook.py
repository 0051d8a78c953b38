"""A hook of mkdocs: the pages of the repository's root become pages of the site, and links among them lead there.

``README.md`` is the home page; so nothing is written twice, and every page reads well in the repository too.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
HOMES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "docs/commands": "commands/index.md",
}
SOURCES = {home: name for name, home in HOMES.items() if name.endswith(".md")}
_LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")
_ROLE = re.compile(r":(?:func|meth|class|mod|attr|data):(?=<code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and a list of the commands."""
    pages = sorted((ROOT / "docs" / "commands").glob("*.md"))
    lines = (f"- [{page.stem}]({page.name}): {_first_sentence(page)}" for page in pages)
    files.append(File.generated(config, "commands/index.md", content="\n".join(["# Commands", "", *lines, ""])))
    for home, name in SOURCES.items():
        files.append(File.generated(config, home, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from where a page lies in the repository become links from where it lies in the site."""
    here = page.file.src_uri
    folder = PurePosixPath(SOURCES.get(here, f"docs/{here}")).parent

    def moved(link: re.Match[str]) -> str:
        target = normpath(str(folder / link[2]))
        home = HOMES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        return link[0] if home is None else link[1] + relpath(home, str(PurePosixPath(here).parent)) + link[3]

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names in docstrings are shown as code, without the word that says of what kind they are."""
    return _ROLE.sub("", html)


def _first_sentence(page: Path) -> str:
    text = " ".join(page.read_text(encoding="utf-8").split("\n\n")[1].split())
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(":").rstrip(".") + "."
