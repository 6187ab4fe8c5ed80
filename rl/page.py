"""Makes the self-contained pages: the report of a run, and the page of an evaluation.

Prompts, completions and data are hostile: a page is made by a template that escapes every value, it holds no script,
and its content security policy forbids any.
"""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from rl.monitor import replace_text


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders a template of this folder with `values` into the file."""
    page = _environment().get_template(template).render(values)
    # A completion may hold half of a surrogate pair, which has no UTF-8: it is shown as \ud83d.
    replace_text(path, page.encode("utf-8", "backslashreplace").decode("utf-8"))


def number(value: float | None, spec: str = ".3f") -> str:
    """A number as shown; a dash where there is none."""
    return "-" if value is None else format(value, spec)


def duration(seconds: float) -> str:
    """A time as people say it: 2.9 s, 2 min 31 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def label(name: str) -> str:
    """A key as people say it."""
    return name.replace("_", " ")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, duration=duration, label=label)
    return environment
