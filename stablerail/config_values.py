"""What a setting's text may look like: the types of `stablerail.config`, each with its parser."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    model_validator,
)

from chain import addresses, assets, finality
from chain.errors import BadAddress
from topics.events import Chain
from topics.money import format_amount, parse_amount

Network = Literal["testnet", "mainnet"]

EVM_CHAINS: Final = tuple(chain for chain in Chain if chain in addresses.EVM_CHAINS)
"""The chains our own scanner can read."""

_CHAIN_IDS: Final[Mapping[Network, Mapping[Chain, int]]] = {
    "testnet": {Chain.ETH: 11_155_111, Chain.MATIC: 80_002, Chain.AVAX: 43_113},
    "mainnet": {Chain.ETH: 1, Chain.MATIC: 137, Chain.AVAX: 43_114},
}


WITHDRAWAL_CHAINS: Final = (Chain.MATIC,)
"""The chains that our own wallet can send by."""


def is_mainnet(chain: Chain, chain_id: int) -> bool:
    """By the id that transactions are signed for, whatever the network is called."""
    return chain_id == _CHAIN_IDS["mainnet"][chain]


def network_default(setting: str, network: Network) -> dict[Chain, Any]:
    """What `chain_ids`, `usdc_contracts` or `finality_depths_blocks` is where nothing else is set."""
    if setting == "chain_ids":
        return dict(_CHAIN_IDS[network])
    if setting == "finality_depths_blocks":
        return dict(finality.DEPTH_BLOCKS)
    known = {chain: assets.usdc(assets.Network(network), chain) for chain in EVM_CHAINS}
    return {chain: contract for chain, contract in known.items() if contract is not None}


_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)?", re.ASCII)
_UNIT_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_HOST = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:\[\]@/]*)(:[0-9]{1,5})?")
"""As in a URL, where PostgreSQL's may say several; an empty one is a socket's."""
_BOOTSTRAP = re.compile(r"[\w.\-]+:[0-9]{1,5}(,[\w.\-]+:[0-9]{1,5})*", re.ASCII)


def duration_s(value: Any) -> Any:
    """ "10m" -> 600.0; a number is seconds already."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError('must be a duration such as "30s", "10m" or a number of seconds')
    return float(match[1]) * _UNIT_S[match[2] or "s"]


def evm_address(chain: Chain, address: str) -> str:
    """The contract's canonical address. ValueError when it is none, or of a chain whose contracts are not settings."""
    if chain not in EVM_CHAINS:
        raise ValueError(f"contracts are set for {', '.join(EVM_CHAINS)} only")
    try:
        return addresses.check_address(chain, address)
    except BadAddress:
        raise ValueError(f"{chain}: must be 0x and 40 hex digits, with a right checksum where it has one") from None


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise ValueError("must be JSON") from None


def _listed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def _base_units(value: Any) -> int:
    return parse_amount(value)


def _bootstrap(value: str) -> str:
    if _BOOTSTRAP.fullmatch(value) is None:
        raise ValueError("must be host:port, or several with commas between")
    return value


def url_parts(url: str, says: str) -> SplitResult:
    """Raises ValueError for a URL that does not say its host plainly: a password that is not escaped would be read, and shown, as
    something else."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(says) from None
    _user, at, hosts = parts.netloc.rpartition("@")
    stray = "@" in parts.path + parts.fragment or (not at and "@" in parts.query)
    if stray or not all(_HOST.fullmatch(host) for host in hosts.split(",")):
        raise ValueError(f"{says}; / ? # and @ in a user or password are written %2F %3F %23 %40")
    return parts


def _http_url(value: str) -> str:
    says = "must be an http:// or https:// URL"
    parts = url_parts(value, says)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(says)
    return value.rstrip("/")


def is_private(url: str) -> bool:
    """Whether what is sent there cannot be read on the way: by TLS, or because it does not leave this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in ("127.0.0.1", "::1", "localhost")


def _postgres_url(value: SecretStr) -> SecretStr:
    says = "must be postgresql://user:password@host:port/database"
    parts = url_parts(value.get_secret_value(), says)
    if parts.scheme not in ("postgresql", "postgres") or parts.fragment:
        raise ValueError(says)
    return value


def _entity_secret(value: SecretStr) -> SecretStr:
    if re.fullmatch(r"[0-9a-fA-F]{64}", value.get_secret_value()) is None:
        raise ValueError("must be 64 hex digits")
    return value


class TopUpLimits(BaseModel):
    """Of a chain's lanes, in its coin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    below: BaseUnits
    upto: BaseUnits
    day_max: BaseUnits
    low: BaseUnits = 0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not 0 < self.below < self.upto <= self.day_max:
            raise ValueError("0 < below < upto <= day_max")
        return self

    def __str__(self) -> str:
        return ", ".join(f"{name} {format_amount(value)}" for name, value in self)


def _key_source(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _endpoints(value: dict[Chain, tuple[SecretStr, ...]]) -> dict[Chain, tuple[SecretStr, ...]]:
    for chain, urls in value.items():
        if chain not in EVM_CHAINS:
            raise ValueError(f"only {', '.join(EVM_CHAINS)} can be read by our own scanner")
        if not urls:
            raise ValueError(f"{chain}: at least one URL")
        for url in urls:
            _http_url(url.get_secret_value())
    return value


T = TypeVar("T")
Seconds = Annotated[float, BeforeValidator(duration_s)]
FROM_DECIMAL: Final = BeforeValidator(_base_units)
"""Of an amount of USDC: decimal text in, base units out."""
BaseUnits = Annotated[int, FROM_DECIMAL]
Mapped = Annotated[T, BeforeValidator(_json)]
Listed = Annotated[T, BeforeValidator(_listed)]
Bootstrap = Annotated[str, AfterValidator(_bootstrap)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres_url)]
EntitySecret = Annotated[SecretStr, AfterValidator(_entity_secret)]
RpcUrls = Annotated[dict[Chain, tuple[SecretStr, ...]], BeforeValidator(_json), AfterValidator(_endpoints)]
KeySource = Annotated[str, BeforeValidator(_key_source), Field(min_length=1, max_length=2_000)]
Prefix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{0,80}$")]
LowerName = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,62}$")]
PORT_MAX: Final = 65_535
Port = Annotated[int, Field(ge=1, le=PORT_MAX)]
