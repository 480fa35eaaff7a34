"""A company's own table of balances, beside the ledger: its names, what it shows of a customer, pages of it.

One row per customer, one column per account type. Amounts are decimal units or integers of the smallest unit the table keeps:

| amounts | digits | 12.345678 USDC there |
| --- | --- | --- |
| decimal | 6 / 2 | 12.345678 / 12.34 |
| integer | 6 (base units) / 2 (cents) | 12345678 / 1234 |

What the table cannot keep is cut off, never rounded up: `shown` says what it has to show for a balance of ours. A row that is
missing and a column that is NULL are zero. All names are configured, so each is checked and quoted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Final, Literal

from ledger.accounts import CUSTOMERS, AccountType
from ledger.errors import LegacyUnusable
from ledger.reading import Reader

DIGITS: Final = 6
"""What the ledger keeps of every asset."""
Held = Mapping[AccountType, Decimal]
"""What a row shows, in the ledger's base units. Decimal: a table may hold what we never wrote, half a base unit say."""
UserType = Literal["text", "uuid", "bigint"]

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)
_KEYS: Final[Mapping[str, str]] = {
    "text": "{0}",
    "uuid": "CASE WHEN {0} ~ '^[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$' THEN ({0})::uuid END",
    "bigint": "CASE WHEN {0} ~ '^(0|-?[1-9][0-9]{{0,17}})$' THEN ({0})::bigint"
    " WHEN {0} ~ '^-?[1-9][0-9]{{18}}$' THEN"
    " CASE WHEN ({0})::numeric BETWEEN -9223372036854775808 AND 9223372036854775807 THEN ({0})::bigint END END",
}
"""A customer's id as the table's key, so that its index serves; NULL for an id that cannot be one."""
_USER_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text", "character varying"),
    "uuid": ("uuid",),
    "bigint": ("bigint", "integer", "smallint"),
}
_EXACT: Final = ("numeric", "bigint", "integer", "smallint")


@dataclass(frozen=True)
class Legacy:
    """Where the balances are. ValueError says which name is wrong."""

    table: str
    """schema.table"""
    user_column: str
    user_type: UserType
    columns: Mapping[AccountType, str]
    integer: bool
    digits: int
    """Decimal digits that it keeps of a unit, 0 to 6."""

    def __post_init__(self) -> None:
        parts = self.table.split(".")
        if len(parts) != 2:
            raise ValueError("the table must be schema.table")
        if not self.columns:
            raise ValueError("at least one account type must have a column")
        names = [self.user_column, *self.columns.values()]
        for name in (*parts, *names):
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"{name[:40]!r} is no name: letters, digits and _, at most 63")
        if len({*names}) < len(names):
            raise ValueError("a column is named twice")
        for type in self.columns:
            if type not in CUSTOMERS:
                raise ValueError(f"{type} is no account of a customer; there are {', '.join(sorted(CUSTOMERS))}")
        if not 0 <= self.digits <= DIGITS:
            raise ValueError(f"digits must be 0 to {DIGITS}")

    @cached_property
    def step(self) -> int:
        """Base units of the ledger in the smallest amount that the table keeps."""
        return int(10 ** (DIGITS - self.digits))

    def shown(self, balance: int) -> int:
        """What the table has to show for a balance of the ledger, both in base units."""
        return balance // self.step * self.step

    @cached_property
    def types(self) -> tuple[AccountType, ...]:
        """In the order of the columns below."""
        return tuple(sorted(self.columns))

    @cached_property
    def quoted(self) -> str:
        """The table, for a statement."""
        return ".".join(f'"{part}"' for part in self.table.split("."))

    @cached_property
    def user(self) -> str:
        return f'"{self.user_column}"'

    def column(self, type: AccountType) -> str:
        return f'"{self.columns[type]}"'

    def key(self, text: str) -> str:
        """The SQL of a text as the type of the user column; NULL where it cannot be one."""
        return _KEYS[self.user_type].format(text)

    @property
    def unit(self) -> str:
        """Base units in one of the table's numbers, as SQL."""
        return str(self.step if self.integer else 10**DIGITS)

    @cached_property
    def shows(self) -> str:
        """What a row shows of each type, in the ledger's base units and as text: the columns of a select from `l`."""
        return ", ".join(f"(coalesce(l.{self.column(type)}, 0) * {self.unit}::numeric)::text" for type in self.types)

    @cached_property
    def _select(self) -> str:
        return f"SELECT l.{self.user}::text, {self.shows} FROM {self.quoted} l"  # noqa: S608  (checked names only)

    @cached_property
    def _read(self) -> str:
        keys = f"(SELECT {self.key('x')} AS id FROM unnest($1::text[]) x)"  # noqa: S608
        return f"{self._select} JOIN {keys} y ON l.{self.user} = y.id"

    @cached_property
    def _page(self) -> str:
        return f"{self._select} WHERE l.{self.user} > {self.key('$2::text')} ORDER BY l.{self.user} LIMIT $1"

    @cached_property
    def _first_page(self) -> str:
        """A statement of its own: with "or there is none before", no plan could begin at a key."""
        return f"{self._select} WHERE l.{self.user} IS NOT NULL ORDER BY l.{self.user} LIMIT $1"

    async def read(self, connection: Reader, users: Iterable[str]) -> dict[str, Held]:
        """What the customers' rows show; who has none is left out. One statement."""
        rows = await connection.fetch(self._read, list(users))
        return {user: self._held(values) for user, *values in rows}

    async def page(self, connection: Reader, after: str | None, limit: int) -> list[tuple[str, Held]]:
        """The next rows in the order of the key, after the customer `after`; fewer than `limit` are the last."""
        if after is None:
            rows = await connection.fetch(self._first_page, limit)
        else:
            rows = await connection.fetch(self._page, limit, after)
        return [(user, self._held(values)) for user, *values in rows]

    def _held(self, values: Iterable[str]) -> Held:
        return dict(zip(self.types, map(Decimal, values), strict=True))

    async def check(self, connection: Reader) -> None:
        """Whether the table is as it is configured, and exact. Raises LegacyUnusable."""
        schema, table = self.table.split(".")
        rows = await connection.fetch(_COLUMNS, schema, table)
        found = {name: (kind, unique) for name, kind, unique in rows}
        if not found:
            raise LegacyUnusable("LEGACY_TABLE", f"there is no table {self.table} that this login may see")
        kind, unique = found.get(self.user_column, ("", False))
        if kind not in _USER_TYPES[self.user_type] or not unique:
            expected = " or ".join(_USER_TYPES[self.user_type])
            raise LegacyUnusable("LEGACY_USER_COLUMN", f"{self.user_column} must be {expected} with a unique index")
        for name in self.columns.values():
            if found.get(name, ("", False))[0] not in _EXACT:
                raise LegacyUnusable("LEGACY_COLUMNS", f"{name} must be a column of {' or '.join(_EXACT)}")


_COLUMNS: Final = """
SELECT a.attname, format_type(a.atttypid, NULL), EXISTS (
    SELECT 1 FROM pg_index i
    WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum
      AND i.indpred IS NULL
)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped
"""
