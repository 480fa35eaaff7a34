"""What the translators of all KYC vendors share."""

from __future__ import annotations

from pydantic import ValidationError

from connectors.webhooks.source import NotUnderstood


def not_understood(error: ValidationError) -> NotUnderstood:
    """The first thing that is wrong, without its contents."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return NotUnderstood("not_json", first["msg"][:200])
    where = ".".join(map(str, first["loc"]))[:100]
    return NotUnderstood("wrong_schema", f"{where}: {first['msg'][:200]}")
