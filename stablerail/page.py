"""The pages that workers show on Faust's own web: one table each, no scripts, fit for a phone and for the dark."""

from __future__ import annotations

from html import escape
from typing import Final

_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b2733;background:#fff}
h1{font-size:1.3rem;margin:0 0 .2rem} p{color:#5a6b7b;margin:0 0 1.2rem}
table{border-collapse:collapse;width:100%} th,td{padding:.45rem .7rem;border-bottom:1px solid #e3e8ed;text-align:right}
th{font-weight:600;font-size:.85rem;color:#5a6b7b} th:first-child,td:first-child{text-align:left}
td:first-child b{display:block} td:first-child small{color:#5a6b7b} .bad{color:#b3261e;font-weight:600}
@media(prefers-color-scheme:dark){body{background:#12181f;color:#dfe7ee}th,td{border-color:#2a3541}}
"""


def page(title: str, about: str, heads: str, rows: str) -> str:
    """`about`, `heads` and `rows` are HTML; the title is text."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
        f"<title>{escape(title)} · Stablerail</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><p>{about}</p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )
