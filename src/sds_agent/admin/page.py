"""The page as a file in this package, and the policy under which a browser shows it."""

import base64
import hashlib
import re
from pathlib import Path

from msgspec import Struct

FILE = Path(__file__).with_name("page.html")
_INLINE = re.compile(r"<(?P<tag>script|style)[^>]*>(?P<text>.*?)</(?P=tag)>", re.DOTALL)


class Page(Struct, frozen=True):
    """The page, and its Content-Security-Policy: its own script and style, by their hashes, and nothing else."""

    html: str
    policy: str


def read() -> Page:
    """Read the page."""
    html = FILE.read_text(encoding="utf-8")
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for found in _INLINE.finditer(html):
        allowed[found["tag"]].append(_source(found["text"]))
    return Page(
        html,
        f"default-src 'none'; script-src {' '.join(allowed['script'])}; style-src {' '.join(allowed['style'])}; "
        "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    )


def _source(text: str) -> str:
    """A hash-source (CSP level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
