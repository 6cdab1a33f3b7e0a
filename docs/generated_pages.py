"""Pages of the documentation site that are made from other files: a hook of mkdocs.

`benchmarks/RESULTS.md`, `CONTRIBUTING.md` and `CHANGELOG.md` are where their readers expect them and are shown on
the site too. Links between files of the repository are written so that they work there; here they become links between
pages, or links to the repository where a file is no page. `options.md` is made from `tracing_jax/options.py`,
`formats.md` from the tables that the reader of checkpoints works with.
"""

import dataclasses
import html
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tracing_jax.arch import SUPPORTED_FAMILIES, SUPPORTED_MULTIMODAL
from tracing_jax.checkpoint.gguf.families import GGUF_FAMILIES
from tracing_jax.checkpoint.quantised import FORMATS
from tracing_jax.dataclass_options import Option, options_of, sections_of
from tracing_jax.options import RunOptions

ROOT = Path(__file__).parent.parent
PAGES = {"benchmarks/RESULTS.md": "benchmarks.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File of the repository -> page of the site."""

_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and the figures of the benchmarks beside them."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "options.md", content=options_page()))
    files.append(File.generated(config, "formats.md", content=formats_page()))
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


_HEAD = """# Options

The options of a run, as `tracing_jax/options.py` declares them. `tracing-jax compare --help` prints the same list.

| where | how an option is set |
|---|---|
| `tracing-jax compare`, `align` | `--level 1e-4`, `--match.max_tokens 8192`; a switch as `--align` or `--no-align` |
| `main.py` | the same flags, `--noalign`; or `--config.level=1e-4` with `--config=configs/NAME.py` |
| `launch.py` | `--config.level=1e-4`, also with `--config=configs/NAME.py` |
| a config file | `RunOptions(level=1e-4, match=Match(max_tokens=8192))` |
| Python | `tj.trace(base, ft, level=1e-4, match={"max_tokens": 8192})` |

A list of names is written with commas between them, or in parts: `--stat csu --stat match`.
"""


def options_page() -> str:
    """Returns the page of options: a table for each group, then one for each statistic and the mesh."""
    options = list(options_of(RunOptions))
    groups = dict.fromkeys(option.group for option in options if "." not in option.name)
    pages = [_HEAD]
    for group in groups:
        rows = [option for option in options if option.group == group and "." not in option.name]
        pages += [f"## {group.capitalize()}", _table(rows)]
    pages.append("## Statistics and mesh, by section")
    for name, section in sections_of(RunOptions).items():
        rows = [option for option in options if option.name.startswith(f"{name}.")]
        meaning = (section.__doc__ or "").splitlines()[0]
        pages += [f"### `{name}`", meaning, _table(rows) if rows else "No options."]
    return "\n\n".join(pages) + "\n"


def _table(options: Iterable[Option]) -> str:
    head = ["| option | default | meaning |", "|---|---|---|"]
    return "\n".join([*head, *(f"| `{o.name}` | {_default(o)} | {_meaning(o)} |" for o in options)])


def _default(option: Option) -> str:
    value = option.default
    if option.required or value is dataclasses.MISSING:
        return "required"
    if value is None or value == ():
        return "–"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(option: Option) -> str:
    choices = f" One of {', '.join(f'`{choice}`' for choice in option.choices)}." if option.choices else ""
    if option.is_list:
        choices = choices.replace(" One of", " Of")
    return html.escape(option.meaning, quote=False).replace("|", "\\|") + choices


_FORMATS_HEAD = """# Families and formats

Levels of support and GGUF architectures are those of the code; quantised files and adapters are made into the family's
own tensors before they are read, so that their level is that of the family. `forward`: with a forward pass, so that
everything works; `weights`: [by its weights alone](checkpoints.md#models-read-by-their-weights-alone), so that all
tests run which need no forward pass. How well the latter was told apart, family by family, is [measured](families.md).

Quantised are safetensors and `.bin` files in these formats, whatever the family; any other is refused by its name:
"""


def formats_page() -> str:
    """Returns the page of families, levels of support and formats."""
    of_gguf: dict[str, list[str]] = {}
    for architecture, family in GGUF_FAMILIES.items():
        for model_type in (family.model_type, *family.also):
            of_gguf.setdefault(model_type, []).append(f"`{architecture}`")
    names = {name: name for name in SUPPORTED_FAMILIES}
    names |= {name: f"{name} (language model)" for name in SUPPORTED_MULTIMODAL}
    rows = [["family", "safetensors, `.bin`", "quantised", "LoRA adapter", "GGUF"], ["---"] * 5]
    for name, shown in sorted(names.items()):
        architectures = ", ".join(of_gguf.get(name, ()))
        otherwise = "as its language model" if name in SUPPORTED_MULTIMODAL else "weights"
        rows.append([shown, *["forward"] * 3, f"forward: {architectures}" if architectures else otherwise])
    rows.append(["any other", "weights", "weights", "weights, but for tied embeddings", "weights"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([_FORMATS_HEAD, *(f"* {form}" for form in FORMATS), "", table, ""])
