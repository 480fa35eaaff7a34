"""dead-letters.md: every code that a dead letter may have, by whose affair it is."""

from __future__ import annotations

from topics.codes import CODES, Code, Whose

_HEAD = """\
# Dead letters: their codes

Made from `topics/codes.py` by `make docs`. What an operator does is in [operations.md](operations.md#dead-letters). A code that is not here is another
release's: it is taken for ours.

*by itself*: sent again later and later, eight times. *can help*: `stablerail dlq redrive`, once something has changed. *no*: the same event can never be
settled; it must come again, right and with an id of its own, unless something else is said.
"""
_TITLES = {
    Whose.CUSTOMER: "Of customers",
    Whose.PRODUCER: "Of whoever wrote the event",
    Whose.PARTNER: "Of partners: a vendor, a custodian, a chain",
    Whose.OURS: "Ours",
}


def document() -> str:
    parts = [_HEAD]
    for whose, title in _TITLES.items():
        rows = [_row(name, code) for name, code in sorted(CODES.items()) if code.whose is whose]
        parts.append(
            "\n".join(
                [
                    f"## {title}",
                    "",
                    "| code | it means | redriving | what helps |",
                    "| --- | --- | --- | --- |",
                    *rows,
                    "",
                ]
            )
        )
    return "\n".join(parts)


def _row(name: str, code: Code) -> str:
    redriving = "by itself" if code.heals else "can help" if code.redrivable else "no"
    return f"| `{name}` | {code.meaning} | {redriving} | {code.remedy} |"
