"""Pages of the documentation site that are made from other files: a hook of mkdocs.

`benchmarks/RESULTS.md`, `CONTRIBUTING.md` and `CHANGELOG.md` stand where their readers look for them and are shown on
the site too. Links between files of the repository are written so that they work there; here they become links between
pages, or links to the repository where a file is no page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"benchmarks/RESULTS.md": "benchmarks.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File of the repository -> page of the site."""

_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and the figures of the benchmarks beside them."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for figure in sorted((ROOT / "benchmarks").glob("*.png")):
        files.append(File.generated(config, figure.name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page that point to files of the repository."""
    source = next((name for name, uri in PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda link: _target(link[1], posixpath.dirname(source), config), markdown)


def _target(link: str, folder: str, config: MkDocsConfig) -> str:
    """Returns where a link of a file in `folder` of the repository leads on the site."""
    path = posixpath.normpath(posixpath.join(folder, link))
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("benchmarks/") and path.endswith(".png"):
        return posixpath.basename(path)
    if (ROOT / path).exists():
        return f"{config.repo_url}/blob/main/{path}"
    return link
