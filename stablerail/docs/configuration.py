"""docs/configuration.md: every setting with its default, its meaning, and whether it is a secret."""

from __future__ import annotations

from typing import Any, Final, get_args

from pydantic import SecretStr
from pydantic_settings import PydanticBaseSettingsSource

from stablerail.config import ALSO_CALLED, PREFIX, WITHOUT_EFFECT, Settings
from stablerail.config_shown import describe

_HEAD: Final = f"""\
# Configuration

Made by `make docs` from `stablerail/config.py`; `stablerail config` prints the values in effect.

A setting is an environment variable, or a line of a `.env` file; the environment wins. A name with the prefix `{PREFIX}` that is no
setting stops a program, as does a wrong value; each is named, with what is expected, and no value is repeated.

* Times are seconds, or have a unit: `30`, `500ms`, `30s`, `10m`, `1h`, `1d`.
* Lists are `ETH,SOL` or JSON, mappings are JSON, amounts are decimal USDC.
* Secrets are never printed, logged or stored; addresses of databases and endpoints are shown without their credentials.

| setting | default | meaning | secret |
| --- | --- | --- | --- |
"""

_OTHERS: Final = """
## Other names

These are taken too; where both are set, the setting's own name wins.

| name | setting |
| --- | --- |
"""

_UNUSED: Final = """
## Names without effect

`stablerail config` says so where one of these is set.

| name | why |
| --- | --- |
"""


class Defaults(Settings):
    """The settings of a machine on which none is set."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: Any, init_settings: PydanticBaseSettingsSource, *_others: Any, **_named: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def document() -> str:
    testnet, mainnet = describe(Defaults(network="testnet")), describe(Defaults(network="mainnet"))
    rows = []
    for field, test, main in zip(Settings.model_fields, testnet, mainnet, strict=True):
        value = _code(test.value)
        if test.value != main.value and field != "network":
            value = f"testnet: {value}<br>mainnet: {_code(main.value)}"
        rows.append(_row(f"`{test.name}`", value, _text(test.help), "secret" if is_secret(field) else ""))
    others = [_row(f"`{other}`", f"`{PREFIX}{field.upper()}`") for field, other in sorted(ALSO_CALLED.items())]
    unused = [_row(f"`{name}`", _text(why)) for name, why in sorted(WITHOUT_EFFECT.items())]
    return _HEAD + "".join(rows) + _OTHERS + "".join(others) + _UNUSED + "".join(unused)


def is_secret(field: str) -> bool:
    """Whether any part of the setting is kept as a secret: a password, a key, or an address that may hold one."""

    def within(annotation: Any) -> bool:
        return annotation is SecretStr or any(within(part) for part in get_args(annotation))

    return within(Settings.model_fields[field].annotation)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _code(value: str) -> str:
    return value if value.startswith("(") else f"`{value}`" if value else "(empty)"


def _text(value: str) -> str:
    return value.replace("|", "\\|").replace("<", "&lt;")
