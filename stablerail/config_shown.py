"""How settings are shown: `stablerail config` and docs/configuration.md. Secrets and credentials in URLs are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, get_args

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from stablerail.config import PREFIX, Settings
from stablerail.config_values import FROM_DECIMAL, url_parts
from topics.money import format_amount

MASK: Final = "********"


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One line of `stablerail config`."""

    name: str
    value: str
    is_default: bool
    help: str


def describe(settings: Settings) -> tuple[SettingRow, ...]:
    """Every setting as `stablerail config` prints it; secrets and credentials in URLs are masked."""
    return tuple(
        SettingRow(
            name=PREFIX + name.upper(),
            value=_shown(name, getattr(settings, name), _in_usdc(field)),
            is_default=name not in settings.model_fields_set,
            help=field.description or "",
        )
        for name, field in type(settings).model_fields.items()
    )


def _in_usdc(field: FieldInfo) -> bool:
    """Whether its value, or each value of its mapping, is an amount of USDC in base units."""
    within = (getattr(part, "__metadata__", ()) for part in get_args(field.annotation))
    return any(FROM_DECIMAL in metadata for metadata in (field.metadata, *within))


def _shown(name: str, value: Any, in_usdc: bool) -> str:
    if value is None:
        return "(not set)"
    if isinstance(value, int) and in_usdc:
        return f"{format_amount(value)} USDC"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(name, each, in_usdc)}" for key, each in value.items()) or "(none)"
    if isinstance(value, tuple):
        return ", ".join(_shown(name, each, in_usdc) for each in value) or "(none)"
    if isinstance(value, SecretStr):
        return masked_url(value.get_secret_value()) if name.endswith(("_url", "_urls")) else MASK
    if isinstance(value, float):
        return f"{value:g}"
    return masked_url(value) if isinstance(value, str) and "://" in value else str(value)


def masked_url(url: str) -> str:
    """Scheme, user, host, port and, for a database, its name. Providers put keys into user, password, path or query."""
    try:
        parts = url_parts(url, "")
    except ValueError:
        return MASK
    host = parts.netloc.rpartition("@")[2]
    user = f"{parts.username}:{MASK}@" if parts.password and parts.username else f"{MASK}@" if parts.username else ""
    if parts.scheme in ("postgresql", "postgres"):
        return f"{parts.scheme}://{user}{host}{parts.path}" + (f"?{MASK}" if parts.query else "")
    tail = f"/{MASK}" if parts.path.strip("/") or parts.query else ""
    return f"{parts.scheme}://{MASK + '@' if user else ''}{host}{tail}"
