"""The page on which a person tries the model: one file, nothing from outside."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files


@functools.cache
def page() -> tuple[str, str]:
    """Return the page, and the policy that lets a browser run its own script and speak to this server alone."""
    html = files("nogemm.serve").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {
        kind: [_hash(text) for text in re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)] for kind in _KINDS
    }
    allowed = "; ".join(f"{kind}-src {' '.join(hashes[kind])}" for kind in _KINDS)
    more = "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    return html, f"default-src 'none'; {allowed}; {more}"


_KINDS = ("script", "style")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
