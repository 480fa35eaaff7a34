"""What may go wrong with a chain.

ChainError (code, detail)
 ├── UnknownChain       unknown_chain      not a chain we have wallets on
 ├── BadAddress         bad_address        not an address of that chain, or its checksum is wrong
 ├── BadTxHash          bad_tx_hash        not a transaction's hash (on Solana: signature)
 ├── BadLog             bad_log            a log that claims to be a Transfer and is not one
 ├── ChainMoved         chain_moved        the chain was reorganised while it was read: read again
 ├── NoAgreement        no_agreement       no two endpoints say the same, where several are configured: ask again
 ├── KeystoreError
 │    ├── BadKeystore    bad_keystore      not there, or no key that we read
 │    ├── WrongPassword  wrong_password    the password does not open the keystore
 │    └── WrongSigner    wrong_signer      the key is another address's than was expected
 ├── SignerError
 │    ├── KeyUnavailable  key_unavailable  the key's store (AWS, a disk) does not give it now, throttles or refuses: nothing is signed, ask again
 │    └── BadSignature    bad_signature    the key store answered what is no signature of the key
 ├── ReorgTooDeep       reorg_too_deep     no stored block is canonical any more: a person must choose where to scan from
 └── RpcError (endpoint)
      ├── RpcUnavailable  rpc_unavailable  no connection, or an HTTP answer that is none (5xx, a redirect)
      │    └── RpcRateLimited  rpc_rate_limited  it wants us to wait (429, Retry-After): nothing is sent to it meanwhile
      ├── RpcTimeout      rpc_timeout      no whole answer in time
      ├── RpcRefused      rpc_refused      a JSON-RPC error (method, rpc_code)
      ├── RpcTooLarge     rpc_too_large    the answer is over our limit, or HTTP 413
      ├── RpcGarbled      rpc_garbled      the answer is not what the method answers
      └── WrongChainId    wrong_chain_id   the endpoint serves another chain

Reads may be repeated after any RpcError but WrongChainId; whether to is the caller's decision.
"""

from __future__ import annotations

from typing import ClassVar


class ChainError(Exception):
    """The root. `code` is stable: dead-letter header, problem `code` and metric label alike."""

    code: ClassVar[str] = "chain_error"

    def __init__(self, detail: str) -> None:
        super().__init__(f"{self.code}: {detail}")
        self.detail = detail


class UnknownChain(ChainError):
    code = "unknown_chain"


class BadAddress(ChainError):
    code = "bad_address"


class BadTxHash(ChainError):
    code = "bad_tx_hash"


class BadLog(ChainError):
    code = "bad_log"


class ChainMoved(ChainError):
    code = "chain_moved"


class NoAgreement(ChainError):
    code = "no_agreement"


class ReorgTooDeep(ChainError):
    code = "reorg_too_deep"


class KeystoreError(ChainError):
    code = "keystore_error"


class BadKeystore(KeystoreError):
    code = "bad_keystore"


class WrongPassword(KeystoreError):
    code = "wrong_password"


class WrongSigner(KeystoreError):
    code = "wrong_signer"


class SignerError(ChainError):
    code = "signer_error"


class KeyUnavailable(SignerError):
    code = "key_unavailable"


class BadSignature(SignerError):
    code = "bad_signature"


class RpcError(ChainError):
    """`endpoint` is the masked URL: scheme and host, never the path, which may carry a key."""

    code = "rpc_error"

    def __init__(self, endpoint: str, detail: str) -> None:
        super().__init__(f"{endpoint}: {detail}")
        self.endpoint = endpoint


class RpcUnavailable(RpcError):
    code = "rpc_unavailable"


class RpcRateLimited(RpcUnavailable):
    code = "rpc_rate_limited"


class RpcTimeout(RpcError):
    code = "rpc_timeout"


class RpcTooLarge(RpcError):
    code = "rpc_too_large"


class RpcGarbled(RpcError):
    code = "rpc_garbled"


class RpcRefused(RpcError):
    code = "rpc_refused"

    def __init__(self, endpoint: str, method: str, rpc_code: int, message: str, data: str = "") -> None:
        """`data`: what a contract that reverted left."""
        super().__init__(endpoint, f"{method} was refused with {rpc_code}: {message}")
        self.method = method
        self.rpc_code = rpc_code
        self.message = message
        self.data = data


class WrongChainId(RpcError):
    code = "wrong_chain_id"

    def __init__(self, endpoint: str, expected: int, actual: int) -> None:
        super().__init__(endpoint, f"serves chain {actual}, expected {expected}")
        self.expected = expected
        self.actual = actual
