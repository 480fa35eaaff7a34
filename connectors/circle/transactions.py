"""A transaction object of Circle's -> deposits.notified, transfers.notified: the same words from a notification, the list and a look-up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from connectors.circle.chains import EVM_CHAINS, Network, from_circle
from connectors.webhooks.source import NotUnderstood
from topics.events import Address, DepositNotified, Evidence, Text, TransferNotified, TxHash

SOURCE: Final = "circle"


class Model(BaseModel):
    """What Circle writes, in its camelCase; unknown fields are ignored, and nothing is converted."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, strict=True)


class _Inbound(Model):
    """The transaction object, as far as it is read."""

    id: Text
    state: str
    blockchain: Annotated[str, Field(pattern=r"^[A-Z0-9-]{1,40}$")]
    token_id: Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,100}$")]
    destination_address: Address
    tx_hash: TxHash
    amounts: Annotated[list[str], Field(min_length=1, max_length=1)]
    transaction_type: Literal["INBOUND"] = "INBOUND"
    block_hash: Any = None
    block_height: Any = None
    source_address: Any = None


FAILED: Final = frozenset({"FAILED", "DENIED", "CANCELLED"})
"""The ends of a transfer that is not paid."""
_SPELLED: Final = {"CANCELED": "CANCELLED"}
"""Circle's webhook page has one L, its SDK two."""
ENDED: Final = frozenset({"COMPLETE", *FAILED, *_SPELLED})
"""States that no other follows."""
EVIDENCE: Final[Mapping[str, Evidence]] = {
    "CONFIRMED": Evidence.CONFIRMED,
    **dict.fromkeys(ENDED, Evidence.FAILED),
    "COMPLETE": Evidence.COMPLETE,
}
"""Circle's state -> ours; an inbound transaction in another one is not understood."""
_ADDRESS: Final = re.compile(r"[0-9A-Za-z_.:-]{1,128}", re.ASCII)
_PLAIN: Final = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,199}")
_BLOCK_HASH: Final = re.compile(r"0x[0-9a-fA-F]{64}")


def notified(
    transaction: Mapping[str, Any], network: Network, usdc_tokens: Mapping[str, str]
) -> DepositNotified | NotUnderstood:
    """What an inbound transaction says. Pure and total. `usdc_tokens`: Circle's token id -> our asset.

    A token or a chain that is not ours is passed on as `circle:<Circle's name>`, which the stage refuses with
    unsupported_token or unknown_chain; without the prefix Circle's mainnet "ETH" would pass for our testnet chain.
    """
    try:
        inbound = _Inbound.model_validate(transaction)
        if inbound.state not in EVIDENCE:
            return NotUnderstood("unknown_state", f"an inbound transaction in state {inbound.state[:80]!a}")
        return _notified(inbound, network, usdc_tokens)
    except ValidationError as error:
        return wrong_schema(error)


def _notified(inbound: _Inbound, network: Network, usdc_tokens: Mapping[str, str]) -> DepositNotified:
    chain = from_circle(inbound.blockchain, network)
    block_hash, height = inbound.block_hash, inbound.block_height
    in_hex = isinstance(block_hash, str) and _BLOCK_HASH.fullmatch(block_hash) is not None
    return DepositNotified(
        source=SOURCE,
        transfer_id=inbound.id,
        chain=chain or f"circle:{inbound.blockchain}",
        # Case says nothing in hexadecimal, and two reports of one transfer must be equal.
        tx_hash=inbound.tx_hash.lower() if chain in EVM_CHAINS else inbound.tx_hash,
        to=inbound.destination_address.lower() if chain in EVM_CHAINS else inbound.destination_address,
        asset=usdc_tokens.get(inbound.token_id, f"circle:{inbound.token_id}"),
        amount=inbound.amounts[0],
        evidence=EVIDENCE[inbound.state],
        block_hash=block_hash.lower() if in_hex else None,
        block_number=height if type(height) is int and 0 <= height < 2**63 else None,
        sender=_sender(inbound.source_address),
    )


class _Outbound(Model):
    """What left one of our wallets, as far as it is read. Before it is sent it has no hash."""

    id: Text
    state: Annotated[str, Field(pattern=r"^[A-Z_]{1,40}$")]
    blockchain: Annotated[str, Field(pattern=r"^[A-Z0-9-]{1,40}$")]
    destination_address: Address | None = None
    amounts: Annotated[list[str], Field(max_length=1)] | None = None
    tx_hash: TxHash | Literal[""] | None = None
    transaction_type: Literal["OUTBOUND"] = "OUTBOUND"
    operation: str | None = None
    token_id: str | None = None
    ref_id: Any = None
    block_height: Any = None
    error_reason: Any = None


def transferred(
    transaction: Mapping[str, Any], network: Network, usdc_tokens: Mapping[str, str]
) -> TransferNotified | NotUnderstood | None:
    """What an outbound transaction says; None where it is none of ours: no transfer of USDC, or of another network. Pure and
    total."""
    try:
        outbound = _Outbound.model_validate(transaction)
        chain = from_circle(outbound.blockchain, network)
        foreign = outbound.token_id is not None and outbound.token_id not in usdc_tokens
        if chain is None or foreign or outbound.operation not in (None, "TRANSFER"):
            return None
        height, to, tx_hash = outbound.block_height, outbound.destination_address, outbound.tx_hash or None
        in_hex = chain in EVM_CHAINS
        return TransferNotified.model_validate(
            {
                "source": SOURCE,
                "transfer_id": outbound.id,
                "reference": _text(outbound.ref_id),
                "state": _SPELLED.get(outbound.state, outbound.state),
                "chain": chain.value,
                "to": to.lower() if to and in_hex else to,
                "amount": outbound.amounts[0] if outbound.amounts else None,
                "tx_hash": tx_hash.lower() if tx_hash and in_hex else tx_hash,
                "block_number": height if type(height) is int and 0 <= height < 2**63 else None,
                "reason": _text(outbound.error_reason),
            }
        )
    except ValidationError as error:
        return wrong_schema(error)


def _text(given: Any) -> str | None:
    """What is no text of ours is left out: it decides nothing."""
    return given if isinstance(given, str) and _PLAIN.fullmatch(given) else None


def _sender(given: Any) -> str | None:
    """Where it came from; what is no address is left out, since the money came all the same."""
    return given if isinstance(given, str) and _ADDRESS.fullmatch(given) else None


def wrong_schema(error: ValidationError) -> NotUnderstood:
    """The first field that is not as it should be, without its contents."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return NotUnderstood("wrong_schema", f"{where}: {first['msg']}"[:300])


def created_at(transaction: Mapping[str, Any]) -> datetime | None:
    """When Circle made it, by which its lists are ordered; None for what is no time with a zone."""
    given = transaction.get("createDate")
    try:
        at = datetime.fromisoformat(given) if isinstance(given, str) else None
    except ValueError:
        return None
    return at if at is not None and at.tzinfo is not None else None
