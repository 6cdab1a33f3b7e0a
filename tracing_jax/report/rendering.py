"""Templates become pages: everything put into them is escaped, and a name that is missing is an error."""

from pathlib import Path
from typing import Any

import jinja2

_SHARED = Path(__file__).parent
"""Where the parts that all pages share lie: `head.html`, `parts.html` and `style.css`."""


def render(template: Path, **values: Any) -> str:
    """Returns the template filled in; it may include what lies beside it, and the parts that all pages share."""
    loader = jinja2.FileSystemLoader([template.parent, _SHARED], encoding="utf-8")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(template.name).render(**values)
