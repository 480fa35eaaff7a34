"""What a node's answer to `eth_sendRawTransaction` means: one table for all nodes and providers. Pure.

| verdict | meaning | what follows |
| --- | --- | --- |
| KNOWN | a node has these very bytes | wait for a block |
| AGAIN | not now, or nobody can tell: the transaction may be in a pool or in a block already | the identical bytes again, later |
| REFUSED | no node will ever take these bytes | a person must look; nothing is released |

A refusal is believed only where its text is in the table. Whatever is not recognised is AGAIN: to repeat identical bytes is
harmless for ever, to give up on bytes that a node kept is a payment twice.

Texts are those of geth (and bor), erigon, nethermind (old names and new), reth, besu, openethereum, anvil; of Alchemy, Infura
and QuickNode where these answer for the node. They are no protocol and change: nodes put details before and behind them, so a
row is looked for anywhere in the text.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final, NamedTuple

from chain.errors import RpcRefused


class Verdict(IntEnum):
    """The greater one counts where endpoints differ."""

    UNREACHED = 0
    """No answer; as AGAIN, but another endpoint's refusal is worth more."""
    REFUSED = 1
    AGAIN = 2
    KNOWN = 3


class Answer(NamedTuple):
    verdict: Verdict
    code: str
    """Stable: a row's code, or an RpcError's."""


ACCEPTED: Final = Answer(Verdict.KNOWN, "accepted")
NOT_RECOGNISED: Final = Answer(Verdict.AGAIN, "unknown_answer")

RATE_LIMIT_CODES: Final = frozenset({429, -32005, -32007, -32029})
"""Alchemy; Infura; QuickNode; others."""

_TABLE: Final[tuple[tuple[Verdict, str, str], ...]] = (
    (Verdict.KNOWN, "already_known", r"already known|known transaction|alreadyknown|already imported|with same hash"),
    (Verdict.AGAIN, "nonce_too_low", r"nonce (is )?too low|oldnonce|^mined$|already mined"),
    (Verdict.AGAIN, "nonce_too_high", r"nonce (is )?too high|noncegap|nonce too (far|distant)|gapped.nonce"),
    (
        Verdict.AGAIN,
        "replacement_underpriced",
        r"replacement transaction underpriced|replacementnotallowed|(could not|to) replace existing t"
        r"|another transaction with same nonce|ownnoncealreadyused|replaced by transaction with higher tip",
    ),
    # before the fees: a cap of the node's own is about fees that are too high
    (Verdict.AGAIN, "over_node_fee_cap", r"exceeds the configured cap|fee cap exceeded"),
    (
        Verdict.AGAIN,
        "fee_too_low",
        r"underpriced|less than block base fee|feetoolow|fee too low|below configured minimum gas price|gas price too low"
        r"|gas price is too low|feecap .* below chain minimum|effectivepriorityfeepergas too low",
    ),
    (
        Verdict.AGAIN,
        "insufficient_funds",
        r"insufficient funds|insufficientfunds|insufficient balance|exceeds account balance|would cause overdraft",
    ),
    (
        Verdict.AGAIN,
        "pool_full",
        r"pool is full|pool overflow|too many transactions in the queue|in-flight transaction limit|spammer",
    ),
    (
        Verdict.AGAIN,
        "rate_limited",
        r"rate.?limit|too many requests|request limit reached|compute units per second|credits limited to"
        r"|request count exceeded|exceeded .{0,40}capacity",
    ),
    # an endpoint's fault, not the transaction's; geth says "invalid sender" before it
    (Verdict.AGAIN, "wrong_chain", r"chain.?id|signed for another chain"),
    (
        Verdict.REFUSED,
        "intrinsic_gas_too_low",
        r"intrinsic gas too low|^intrinsicgas$|intrinsic gas exceeds gas limit|transaction gas is too low"
        r"|insufficient gas for floor data",
    ),
    (
        Verdict.REFUSED,
        "gas_limit_too_high",
        r"exceeds block gas limit|gaslimitexceeded|gas limit is greater than|intrinsic gas too high|gas limit (is )?too high"
        r"|exceeds current gas limit|beyond limit",
    ),
    (
        Verdict.REFUSED,
        "invalid_sender",
        r"invalid sender|invalid signature|failedtoresolvesender|failed to recover sender|invalid transaction v, r, s",
    ),
    (Verdict.REFUSED, "sender_not_eoa", r"sender (is )?not an eoa|senderiscontract"),
    (Verdict.REFUSED, "sender_denied", r"is banned in local queue|transaction is not permitted"),
    (Verdict.REFUSED, "tip_above_fee_cap", r"priority fee per gas higher than max fee per gas"),
    (Verdict.REFUSED, "overflow", r"gas ?uint(64)? ?overflow|int256overflow|nonce has max value|higher than 2\^"),
    (
        Verdict.REFUSED,
        "malformed",
        r"^rlp|invalid rlp|rlptoolong|failed to decode signed transaction|oversized data|negative value"
        r"|transaction type not supported|typed transaction too short",
    ),
)
_ROWS: Final = tuple((Answer(verdict, code), re.compile(text, re.IGNORECASE)) for verdict, code, text in _TABLE)


def classify(refusal: RpcRefused) -> Answer:
    """What a JSON-RPC error says. The first row that fits."""
    if refusal.rpc_code in RATE_LIMIT_CODES:
        return Answer(Verdict.AGAIN, "rate_limited")
    return next((answer for answer, pattern in _ROWS if pattern.search(refusal.message)), NOT_RECOGNISED)
