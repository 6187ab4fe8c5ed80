"""Makes the self-contained pages: the report of a run, and the page of an evaluation.

Prompts, completions and data are hostile. A page is made by a template that escapes every value and shows the
characters that would steer a reader's eye; its content security policy lets it load nothing and run nothing but the
script of this folder, by its digest, which in turn cannot make elements from text.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rl.monitor import replace_text

FOLDER = Path(__file__).parent
STYLE = "page.css"

# Control characters but tab and line feed (ANSI escapes begin with one), and what reorders or hides text.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)


def write_page(
    path: Path, template: str, styles: Sequence[str] = (), scripts: Sequence[str] = (), **values: Any
) -> None:
    """Renders a template of this folder with `values` into the file.

    styles, scripts: files of this folder that the page holds beside `STYLE`; the template places them.
    """
    shown = {"styles": [_read(name) for name in (STYLE, *styles)], "scripts": [_read(name) for name in scripts]}
    policy = _security_policy(**shown)
    page = _environment().get_template(template).render(values, **shown, security_policy=policy)
    # A completion may hold half of a surrogate pair, which has no UTF-8: it is shown as \ud83d.
    replace_text(path, page.encode("utf-8", "backslashreplace").decode("utf-8"))


def script_data(value: Any) -> Markup:
    """A value as JSON for a `<script type="application/json">`, which nothing in it can end."""
    return Markup(json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def visible(text: str) -> str:
    """The text with a sign in place of every character that would move the cursor, reorder the line or not be seen."""
    return _STEERING.sub(lambda found: _sign(ord(found.group())), text)


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


def _sign(code: int) -> str:
    """The Unicode picture of a control character, else its number."""
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def _read(name: str) -> Markup:
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def _security_policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    rules = ["default-src 'none'", "base-uri 'none'", "form-action 'none'", f"style-src {_digests(styles)}"]
    if scripts:
        # Text cannot become an element through innerHTML and the like.
        rules += [f"script-src {_digests(scripts)}", "require-trusted-types-for 'script'", "trusted-types 'none'"]
    return "; ".join(rules)


def _digests(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _finalize(value: Any) -> Any:
    """Markup is ours; any other text may be a completion."""
    return visible(value) if type(value) is str else value


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, duration=duration, label=label)
    return environment
