"""Circle's own USDC (FiatTokenV2_2 behind FiatTokenProxy) on an anvil, and the ways a test or demo moves it.

`python -m stablerail.dev.usdc` deploys it on a chain that runs already; docker-compose.kafka.yml does.

Accounts are anvil's unlocked ones, by index: 0 deploys and holds every role, 1 pays, 9 is the proxy's admin, which
must be nobody else, because the proxy answers its admin itself and forwards nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from eth_abi.abi import encode
from eth_utils.abi import function_signature_to_4byte_selector
from eth_utils.address import to_checksum_address

from stablerail.dev.anvil import Node
from stablerail.dev.errors import DevError, PartFailed

DECIMALS = 6
MINT_ALLOWANCE = 2**128
PAYER_BALANCE = 1_000_000_000 * 10**DECIMALS
GAS_MONEY_WEI = 10**18

# A contract whose calldata is a run of ABI-encoded calls of 68 bytes, each made to the token, all of them or none:
#   i = 0; while calldatasize > i: calldatacopy(0, i, 68); if !call(gas, TOKEN, 0, 0, 68, 0, 0): revert; i += 68
BATCH_CODE = (
    "6000"  # 00  PUSH1 0                                   i
    "5b803611"  # 02  loop: JUMPDEST DUP1 CALLDATASIZE GT
    "600a57"  # 06  PUSH1 body JUMPI
    "00"  # 09  STOP
    "5b604481600037"  # 0a  body: JUMPDEST PUSH1 68 DUP2 PUSH1 0 CALLDATACOPY
    "60006000604460006000"  # 11  PUSH1: output 0, 0; input 68, 0; value 0
    "73{token}5af1"  # 1b  PUSH20 token GAS CALL
    "603957"  # 32  PUSH1 next JUMPI
    "600080fd"  # 35  PUSH1 0 DUP1 REVERT
    "5b604401"  # 39  next: JUMPDEST PUSH1 68 ADD
    "600256"  # 3d  PUSH1 loop JUMP
)
# PUSH1 64 DUP1 PUSH1 11 PUSH1 0 CODECOPY PUSH1 0 RETURN: the constructor, which returns the 64 bytes after itself.
BATCH_CONSTRUCTOR = "604080600b6000396000f3"


@dataclass(frozen=True)
class Usdc:
    """A deployed token. Amounts are base units; each mover returns the transaction's hash without waiting for a block."""

    anvil: Node
    address: str
    owner: str
    payer: str
    """Has a billion USDC."""
    batch: str
    """A contract that makes several transfers in one transaction."""

    async def transfer(self, to: str, amount: int, *, sender: str | None = None) -> str:
        """From the payer, or from any address that holds enough: anvil signs for it, and it is given gas money."""
        if sender is None:
            return await self._send(self.payer, calldata("transfer(address,uint256)", to, amount))
        await self.anvil.rpc("anvil_impersonateAccount", sender)
        await self.anvil.rpc("anvil_setBalance", sender, hex(GAS_MONEY_WEI))
        return await self._send(sender, calldata("transfer(address,uint256)", to, amount))

    async def transfer_many(self, transfers: Sequence[tuple[str, int]]) -> str:
        """Several transfers in one transaction, one log each, in this order; their sender is the batch contract."""
        await self.mint(self.batch, sum(amount for _, amount in transfers))
        calls = [calldata("transfer(address,uint256)", to, amount)[2:] for to, amount in transfers]
        return await _send(self.anvil, self.payer, self.batch, "0x" + "".join(calls))

    async def mint(self, to: str, amount: int) -> str:
        return await self._send(self.owner, calldata("mint(address,uint256)", to, amount))

    async def blacklist(self, account: str) -> str:
        """From now on transfers from and to it revert."""
        return await self._send(self.owner, calldata("blacklist(address)", account))

    async def balance_of(self, account: str) -> int:
        query = {"to": self.address, "data": calldata("balanceOf(address)", account)}
        return int(await self.anvil.rpc("eth_call", query, "latest"), 16)

    async def _send(self, sender: str, data: str) -> str:
        return await _send(self.anvil, sender, self.address, data)


async def deploy(anvil: Node, contracts: Path) -> Usdc:
    """Deploys and initializes the token of `contracts` (Tools.contracts); mines the blocks it needs.

    On a chain just started the addresses are always the same.
    """
    accounts = await anvil.rpc("eth_accounts")
    owner, payer, admin = (to_checksum_address(accounts[index]) for index in (0, 1, 9))
    library = await _create(anvil, owner, _artifact(contracts, "SignatureChecker")["bytecode"])
    implementation = await _create(anvil, owner, _linked(_artifact(contracts, "FiatTokenV2_2"), library))
    argument = encode(["address"], [implementation]).hex()
    proxy = await _create(anvil, admin, _artifact(contracts, "FiatTokenProxy")["bytecode"] + argument)
    constructor = BATCH_CONSTRUCTOR + BATCH_CODE.format(token=proxy[2:].lower())
    usdc = Usdc(anvil, proxy, owner, payer, batch=await _create(anvil, owner, "0x" + constructor))
    roles = (owner, owner, owner, owner)  # master minter, pauser, blacklister, owner
    steps = [
        calldata(
            "initialize(string,string,string,uint8,address,address,address,address)",
            *("USD Coin", "USDC", "USD", DECIMALS, *roles),
        ),
        calldata("initializeV2(string)", "USD Coin"),
        calldata("initializeV2_1(address)", owner),
        calldata("initializeV2_2(address[],string)", [], "USDC"),
        calldata("configureMinter(address,uint256)", owner, MINT_ALLOWANCE),
        calldata("mint(address,uint256)", payer, PAYER_BALANCE),
    ]
    for data in steps:
        await _mined(anvil, await usdc._send(owner, data))
    return usdc


def calldata(signature: str, *arguments: Any) -> str:
    """The 0x-prefixed call of `name(type,type)`."""
    inside = signature[signature.index("(") + 1 : -1]
    selector = function_signature_to_4byte_selector(signature)
    return "0x" + (selector + encode(inside.split(","), arguments)).hex()


def _artifact(contracts: Path, name: str) -> dict[str, Any]:
    artifact: dict[str, Any] = json.loads((contracts / f"{name}.json").read_text())
    return artifact


def _linked(artifact: dict[str, Any], library: str) -> str:
    """Its bytecode with the one library it needs put where the compiler left room."""
    bytecode: str = artifact["bytecode"]
    for libraries in artifact["linkReferences"].values():
        for places in libraries.values():
            for place in places:
                start = 2 + 2 * place["start"]
                bytecode = bytecode[:start] + library[2:].lower() + bytecode[start + 2 * place["length"] :]
    return bytecode


async def _create(anvil: Node, sender: str, bytecode: str) -> str:
    receipt = await _mined(anvil, await _send(anvil, sender, None, bytecode))
    return to_checksum_address(receipt["contractAddress"])


async def _send(anvil: Node, sender: str, to: str | None, data: str) -> str:
    """The hash. Raises RpcRefused when the transaction would revert, with the contract's reason."""
    tx = {"from": sender, "data": data} | ({"to": to} if to else {})
    await anvil.rpc("eth_estimateGas", tx)  # anvil would mine it to no effect
    tx_hash: str = await anvil.rpc("eth_sendTransaction", tx)
    return tx_hash


async def _mined(anvil: Node, tx_hash: str) -> dict[str, Any]:
    """The receipt, at once: a chain that mines on a timer, or not at all, is made to mine."""
    receipt = await anvil.rpc("eth_getTransactionReceipt", tx_hash)
    if receipt is None:
        await anvil.rpc("evm_mine")
        receipt = await anvil.wait_mined(tx_hash)
    if receipt["status"] != "0x1":
        raise PartFailed(f"USDC's deployment reverted in {tx_hash}")
    mined: dict[str, Any] = receipt
    return mined


async def deploy_at(anvil: Node, contracts: Path, address: str) -> None:
    """Deploys the token unless it is at `address` already. Raises PartFailed where the chain is not fresh enough for that."""
    remedy = "start the chain anew: its first contracts always get the same addresses"
    if await anvil.rpc("eth_getCode", address, "latest") == "0x":
        made = (await deploy(anvil, contracts)).address
        if made.lower() != address.lower():
            raise PartFailed(f"the chain gave USDC the address {made}", remedy)
        return
    payer = (await anvil.rpc("eth_accounts"))[1]
    query = {"to": address, "data": calldata("balanceOf(address)", payer)}
    if int(await anvil.rpc("eth_call", query, "latest"), 16) == 0:
        raise PartFailed(f"at {address} is no USDC that was wholly deployed", remedy)


def main(
    rpc_url: Annotated[str, typer.Option(help="an anvil")],
    contracts: Annotated[Path, typer.Option(help="folder of FiatTokenV2_2.json and the others")],
    address: Annotated[str, typer.Option(help="where the token is to be")],
) -> None:
    """Deploy Circle's USDC on an anvil that runs already; where it is deployed, do nothing."""
    try:
        asyncio.run(deploy_at(Node(rpc_url), contracts, address))
    except (DevError, aiohttp.ClientError, OSError) as error:
        sys.exit(f"USDC is not deployed: {error}")
    print(f"USDC is at {address}")


if __name__ == "__main__":
    typer.run(main)
