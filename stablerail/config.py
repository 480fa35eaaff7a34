"""Settings: environment (`STABLERAIL_…`) over `.env` over the defaults below. `stablerail config` prints them, masked.

ConfigError (problems: names and what is expected, never a value)
 ├── at start: a setting is wrong, or no setting has that name            load_settings
 └── at start of one process: a setting that this process needs is unset  Settings.require, .secret

A value may be given as: durations 30, "500ms", "30s", "10m", "1h" · lists "ETH,SOL" or JSON · mappings as JSON ·
amounts as decimal USDC. Times are in seconds (`_s`); what counts something says what (`_blocks`, `_events_max`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from dotenv import dotenv_values
from pydantic import AliasChoices, AliasGenerator, Field, SecretStr, ValidationError, ValidationInfo, model_validator
from pydantic import field_validator as check
from pydantic_settings import BaseSettings, SettingsConfigDict

from agents.recovery.retention import MARGIN_DAYS_MIN
from ledger.accounts import CUSTOMERS, AccountType
from ledger.legacy import Legacy
from stablerail.config_values import (
    EVM_CHAINS,
    WITHDRAWAL_CHAINS,
    BaseUnits,
    Bootstrap,
    EntitySecret,
    HttpUrl,
    KeySource,
    Listed,
    LowerName,
    Mapped,
    Network,
    Port,
    PostgresUrl,
    Prefix,
    RpcUrls,
    Seconds,
    TopUpLimits,
    evm_address,
    is_mainnet,
    is_private,
    network_default,
)
from topics.events import Chain
from topics.money import SCALE

PREFIX: Final = "STABLERAIL_"

ALSO_CALLED: Final[Mapping[str, str]] = {
    "alpaca_api_key": "ALPACA_API_KEY",
    "alpaca_api_secret": "ALPACA_API_SECRET",
    "balance_source": "BALANCE_SOURCE",
    "circle_api_key": "CIRCLE_API_KEY",
    "circle_webhook_secret": "CIRCLE_WEBHOOK_SECRET",
    "database_url": "DATABASE_URL",
    "ledger_shadow_mode": "LEDGER_SHADOW_MODE",
    "ledger_strict_mode": "LEDGER_STRICT_MODE",
    "deposit_minimum": "ONCHAIN_MIN_DEPOSIT_AMOUNT",
    "buffer_alert_threshold": "ONCHAIN_BUFFER_ALERT_THRESHOLD",
    "scan_interval_s": "ONCHAIN_DEPOSIT_POLL_INTERVAL",
    "call_attempts_max": "WORKER_MAX_ATTEMPTS",
    "call_concurrency_max": "WORKER_MAX_CONCURRENCY",
    "call_poll_interval_s": "WORKER_POLL_INTERVAL",
    "call_retry_first_s": "WORKER_BASE_BACKOFF",
    "call_retry_max_s": "WORKER_MAX_BACKOFF",
    "worker_shutdown_timeout_s": "WORKER_SHUTDOWN_TIMEOUT",
}
"""The names the source documents use. Ours wins when both are set."""

WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "ONCHAIN_WITHDRAWAL_TIMEOUT": "a withdrawal ends by what the chain says, never by a clock",
}
"""Names of the source documents that no setting answers to. `stablerail config` says so instead of silence."""

# The test and development tools pass their own variables to the processes they start.
_NOT_SETTINGS: Final = (f"{PREFIX}DEV_", f"{PREFIX}TEST_")


def _names(field: str) -> AliasChoices:
    also = ALSO_CALLED.get(field)
    return AliasChoices(PREFIX + field.upper(), *([also] if also else []))


@dataclass(frozen=True, slots=True)
class Problem:
    """One setting that is wrong. `expected` never holds the value that was given."""

    name: str
    expected: str


EXIT_CONFIG: Final = 78
"""EX_CONFIG: settings are wrong or missing."""


class ConfigError(Exception):
    """Settings are wrong or missing; the text names each and says what is expected."""

    code = "bad_settings"

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        lines = [f"  {problem.name}: {problem.expected}" for problem in problems]
        super().__init__("\n".join(["settings are wrong or missing:", *lines]))
        self.problems = problems


class Settings(BaseSettings):
    """Every setting. Field order is the order of `stablerail config`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        enable_decoding=False,  # our validators read JSON, so that a bad value is reported like any other
        alias_generator=AliasGenerator(validation_alias=_names),
        populate_by_name=True,
        validate_default=True,
        hide_input_in_errors=True,
    )

    network: Network = Field("testnet", description="testnet or mainnet: which network every chain name means")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else JSON")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least level logged")
    otlp_traces_url: HttpUrl | None = Field(
        None,
        description="OpenTelemetry collector that traces go to, https://host:4318/v1/traces; unset = none are made",
    )
    trace_ratio: float = Field(
        1.0, ge=0, le=1, description="share of webhooks whose trace is exported, where the sender does not say"
    )
    datadir: Path = Field(Path(".dev"), description="folder for what a worker may lose: Faust's table files")

    actor: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="who acts by the commands, for the audit, where no --actor says so",
    )

    kafka_bootstrap: Bootstrap = Field("127.0.0.1:9092", description="brokers, host:port[,host:port…]")
    topic_prefix: Prefix = Field("", description="put before every topic's name")
    group_prefix: Prefix = Field("stablerail-", description="put before every consumer group's name")
    kafka_session_timeout_s: Seconds = Field(
        6, ge=1, description="a dead worker's partitions stand still this long; the broker's own minimum applies"
    )
    kafka_replication_factor: int = Field(1, ge=1, le=9, description="copies of each topic we make; 3 in production")

    database_url: PostgresUrl | None = Field(None, description="postgresql://user:password@host/database")
    database_schema: LowerName = Field("stablerail", description="PostgreSQL schema that holds every table")
    database_role: LowerName = Field("stablerail_app", description="PostgreSQL role that every connection acts as")
    database_connections_max: int = Field(10, ge=2, le=1000, description="connections of one process")
    database_lock_timeout_s: Seconds = Field(10, gt=0, description="a statement waits so long for a lock, then retries")
    database_idle_timeout_s: Seconds = Field(
        5, gt=0, description="a frozen owner's open transaction is ended, and its locks freed, after this long"
    )

    ledger_shadow_mode: bool = Field(
        False, description="first phase: also write the legacy table; later `stablerail shadow advance|retreat` decides"
    )
    ledger_strict_mode: bool = Field(
        False, description="first phase: refuse a balance that the legacy table shows differently"
    )
    balance_source: Literal["legacy", "ledger"] = Field(
        "legacy", description="first phase: where balances are read while the legacy table is written"
    )
    legacy_url: PostgresUrl | None = Field(
        None,
        description="where the legacy table is, when not in the database of DATABASE_URL; written there from an outbox",
    )
    legacy_table: str | None = Field(
        None, description="balances beside the ledger, schema.table; unset = there is none"
    )
    legacy_user_column: str = Field("user_id", description="the table's key: one row per customer")
    legacy_user_type: Literal["text", "uuid", "bigint"] = Field("text", description="type of that column")
    legacy_columns: Mapped[dict[AccountType, str]] = Field(
        {},
        description="column of each account type that the table has, JSON:"
        ' {"usdc_balance": "usdc_balance", "fiat_exposure": "buying_power"}',
    )
    legacy_amounts: Literal["decimal", "integer"] = Field(
        "decimal", description="12.34 (decimal) or 1234 (integer) for 12.34 USDC where the table keeps 2 digits"
    )
    legacy_digits: int = Field(
        6, ge=0, le=6, description="decimal digits that the table keeps: 6 = base units, 2 = cents"
    )

    alpaca_api_url: HttpUrl = Field(
        "https://broker-api.sandbox.alpaca.markets", description="Alpaca's Broker API, or a sandbox of ours"
    )
    alpaca_api_key: SecretStr | None = Field(None, min_length=8, description="Alpaca's key id; unset = no positions")
    alpaca_api_secret: SecretStr | None = Field(None, min_length=8, description="the key's secret")
    alpaca_timeout_s: Seconds = Field(3, gt=0, description="the balance view waits no longer for positions")

    circle_api_url: HttpUrl = Field("https://api.circle.com", description="Circle's API, or a sandbox of ours")
    circle_api_key: SecretStr | None = Field(None, min_length=8, description="Circle's API key, PREFIX:ID:SECRET")
    circle_entity_secret: EntitySecret | None = Field(None, description="64 hex digits, registered at Circle once")
    circle_wallet_set_id: str | None = Field(
        None, min_length=1, description="wallet set that new wallets go into; unset = one is made and remembered"
    )
    circle_usdc_token_ids: Mapped[dict[Chain, str]] = Field(
        {}, description='Circle\'s id of USDC on each chain, JSON: {"MATIC": "36b6931a-…"}'
    )
    circle_webhook_key_lookups_per_min: int = Field(
        10, ge=1, description="unknown signing-key ids looked up at Circle per minute; more is answered 503"
    )
    circle_subscription_ids: Listed[tuple[str, ...]] = Field(
        (),
        description="of our webhook subscriptions at Circle; others are refused, unset = none is: Circle signs for all its customers",
    )
    circle_webhook_secret: SecretStr | None = Field(
        None,
        min_length=8,
        description="of a relay of yours that signs by HMAC-SHA256; Circle itself signs by a key pair",
    )
    circle_webhook_header: str = Field("X-Signature", min_length=1, description="where the relay puts its signature")
    circle_webhook_time_header: str = Field(
        "X-Timestamp", min_length=1, description='unix seconds, signed before the body and a dot; "none" = body alone'
    )
    circle_webhook_encoding: Literal["hex", "base64"] = Field("hex", description="how the relay writes its signature")
    circle_mint_topic_arns: Listed[tuple[str, ...]] = Field(
        (),
        description="Amazon SNS topics of Circle Mint's notifications, both regions; unset = Mint is not listened to",
    )
    circle_mint_api_url: HttpUrl | None = Field(
        None, description="Circle Mint's API, or a sandbox of ours; unset = Circle's own of the network"
    )
    circle_mint_api_key: SecretStr | None = Field(
        None, min_length=8, description="Circle Mint's API key, PREFIX:ID:SECRET; unset = its transfers are not polled"
    )
    circle_sns_url: HttpUrl | None = Field(
        None, description="a sandbox of ours in the place of Amazon SNS; never on mainnet"
    )
    circle_poll_interval_s: Seconds = Field(30, gt=0, description="pause between two looks at Circle's inbound lists")
    circle_poll_overlap_s: Seconds = Field(
        600, ge=0, description="how far each look at a list goes back; a transaction may show up late"
    )
    sumsub_webhook_secret: SecretStr | None = Field(None, min_length=8, description="Sumsub's webhook secret")

    persona_webhook_secret: SecretStr | None = Field(None, min_length=8, description="Persona's webhook secret")
    persona_window_s: Seconds = Field(
        86_400, gt=0, description="how far the time that Persona signed may be from ours; it repeats for hours"
    )
    onfido_webhook_token: SecretStr | None = Field(None, min_length=8, description="Onfido's webhook token")

    provisioned_chains: Listed[tuple[Chain, ...]] = Field(
        (Chain.ETH, Chain.SOL, Chain.APTOS, Chain.MATIC),
        min_length=1,
        description="chains a new customer gets a wallet on",
    )
    rpc_urls: RpcUrls = Field(
        {},
        description='chains that we read ourselves, JSON: {"MATIC": ["https://…", "https://…"]}; of several endpoints two'
        " must agree before money is final or taken back, one alone is believed",
    )
    chain_ids: Mapped[dict[Chain, int]] = Field({}, description="EIP-155 ids that differ from the network's own, JSON")
    usdc_contracts: Mapped[dict[Chain, str]] = Field(
        {}, description="USDC contracts that differ from the network's own, JSON"
    )
    finality_depths_blocks: Mapped[dict[Chain, int]] = Field(
        {}, description="blocks on top of a deposit's before it is final, where it differs, JSON"
    )
    rpc_timeout_s: Seconds = Field(10, gt=0, description="one RPC request")
    scan_interval_s: Seconds = Field(2, gt=0, description="pause between two looks at a chain's head")
    scan_span_blocks: int = Field(2_000, ge=1, description="most blocks asked for in one eth_getLogs")
    scan_overlap_blocks: int = Field(6, ge=0, description="blocks each pass reads again; a node may lag behind")

    allow_mainnet: bool = Field(False, description="withdrawals may leave by chains of the mainnet: real money")
    withdrawal_chains: Listed[tuple[Chain, ...]] = Field((), description="chains that withdrawals leave by: MATIC")
    circle_withdrawal_wallets: Mapped[dict[Chain, str]] = Field(
        {}, description='Circle\'s id of the wallet that withdrawals of the rail "circle" leave from, by chain, JSON'
    )
    circle_fee_level: Literal["LOW", "MEDIUM", "HIGH"] = Field("MEDIUM", description="fee that Circle's transfers pay")
    circle_transfer_poll_s: Seconds = Field(
        10, gt=0, description="pause between two looks at transfers that Circle makes"
    )
    withdrawal_minimum: BaseUnits = Field(SCALE, description="least USDC of a withdrawal; `limits set` goes over it")
    withdrawal_maximum: BaseUnits = Field(
        1_000_000 * SCALE, description="most USDC of a withdrawal; `limits set` goes over it"
    )
    withdrawal_user_day_maximum: BaseUnits = Field(
        1_000_000 * SCALE, description="most USDC that a customer withdraws in a day (UTC); `limits set` goes over it"
    )
    withdrawal_network_day_maximum: BaseUnits = Field(
        10_000_000 * SCALE, description="most USDC that leaves by a chain in a day (UTC); `limits set` goes over it"
    )
    withdrawal_keystore: KeySource | None = Field(
        None,
        description="our hot wallet's key: a file in Web3 Secret Storage, version 3, scrypt; or secretsmanager:NAME, a secret"
        " that holds such a file's text; or kms:KEY, which keeps it",
    )
    withdrawal_keystore_password: SecretStr | None = Field(
        None, min_length=1, description="opens the keystores, also those of `lanes add`; kms needs none"
    )
    withdrawal_signer: str | None = Field(None, description="the hot wallet's address; another key is then refused")
    withdrawal_in_flight_max: int = Field(
        16, ge=1, le=10_000, description="transactions of a lane that are signed and in no block"
    )
    withdrawal_speed_up_blocks: int = Field(
        20,
        ge=1,
        le=100_000,
        description="blocks without the next transaction of a lane: then it is signed anew with higher fees",
    )
    withdrawal_speed_ups_max: int = Field(
        5, ge=0, le=15, description="how often by itself; 0: never. `tx speed-up --force` goes to 20 attempts"
    )
    withdrawal_stuck_after_s: Seconds = Field(
        1_800, gt=0, description="in no block for so long while it is the next of its lane: a person must look"
    )
    withdrawal_tip_floors_gwei: Mapped[dict[Chain, int]] = Field(
        {}, description="least tip per gas where it differs from the network's, JSON"
    )
    withdrawal_fee_caps_gwei: Mapped[dict[Chain, int]] = Field(
        {}, description="most per gas, tip included, where it differs; signing waits above it, JSON"
    )

    gas_keystore: KeySource | None = Field(
        None,
        description="key of the account that gives lanes coins for gas, as WITHDRAWAL_KEYSTORE has it and with its password;"
        " it signs nothing else",
    )
    gas_top_ups: Mapped[dict[Chain, TopUpLimits]] = Field(
        {},
        description="in coins, JSON: a lane that has less than `below` is given what it lacks of `upto`, all together `day_max` a day"
        ' (UTC); the account is low below `low`: {"MATIC": {"below": "5", "upto": "20", "day_max": "200", "low": "100"}}',
    )

    deposit_minimum: BaseUnits = Field(
        SCALE, description="a smaller deposit goes to suspense, decimal USDC; kept in base units"
    )
    deposit_at_finality: Listed[tuple[Chain, ...]] = Field(
        (), description="chains whose deposits are credited at finality; on the others at once"
    )
    deposit_instant_max: Mapped[dict[Chain, BaseUnits]] = Field(
        {}, description='a larger deposit is credited at finality, by chain, JSON: {"MATIC": "10000"}'
    )
    deposit_outstanding_max: Mapped[dict[Chain, BaseUnits]] = Field(
        {},
        description="what a customer may have credited and not final (all chains) for a deposit on the chain to be"
        " credited at once, JSON",
    )
    buffer_shards: int = Field(1, ge=1, le=256, description="rows of the buffer account, so that workers do not wait")
    buffer_alert_threshold: BaseUnits = Field(
        5_000 * SCALE, description="a USDC buffer below it is low, decimal; kept in base units"
    )
    order_open_max_s: Seconds = Field(
        432_000, gt=0, description="an order that holds money for so long without an end: a person must look"
    )
    discrepancy_alert_threshold: BaseUnits = Field(
        100 * SCALE,
        description="USDC that two sides of a reconciliation may differ by before BufferDiscrepancy is raised",
    )
    custody_check_interval_s: Seconds = Field(
        60, gt=0, description="pause between two comparisons of the custody mirror with our wallets on chain"
    )
    verify_interval_s: Seconds = Field(
        300, gt=0, description="pause between two looks at the invariants by the worker of recovery"
    )
    ledger_shards: Mapped[dict[str, Annotated[int, Field(ge=1, le=256)]]] = Field(
        {}, description='rows of the hot accounts of ours, by type, JSON: {"system_buffer_fiat": 4}'
    )

    stage_batch_events_max: int = Field(2_000, ge=1, le=10_000, description="most events in one transaction")
    stage_batches_in_flight_max: int = Field(2, ge=1, le=4, description="batches between commit and acknowledgement")
    fuse_ratio_max: float = Field(0.5, gt=0, le=1, description="refused share of the window that stops a stage")
    fuse_window_events: int = Field(1_000, ge=10, description="events the share is taken over")
    fuse_run_events_max: int = Field(100, ge=2, description="refusals in a row that stop a stage")

    call_timeout_s: Seconds = Field(15, gt=0, description="one request to a partner")
    call_lease_s: Seconds = Field(60, gt=0, description="a performer owns a call this long; longer than the time-out")
    call_rate_per_s: float = Field(
        10, gt=0, description="requests per second of all workers together (Circle, wallets: 10)"
    )
    call_concurrency_max: int = Field(5, ge=1, le=100, description="requests to one partner at the same time")
    call_members_max: int = Field(200, ge=1, le=200, description="customers in one request (Circle: 200)")
    call_attempts_max: int = Field(5, ge=1, le=100, description="attempts without an answer before a job is failed")
    call_poll_interval_s: Seconds = Field(1, gt=0, description="pause between two looks for calls that are due")
    call_retry_first_s: Seconds = Field(60, gt=0, description="wait before the first repeat of a call; then doubled")
    call_retry_max_s: Seconds = Field(1800, gt=0, description="longest wait between two repeats of a call")
    breaker_failures_max: int = Field(5, ge=1, description="failures in a row that open a partner's circuit breaker")
    breaker_open_s: Seconds = Field(30, gt=0, description="an open breaker lets one request try after this long")

    retention_margin_days: int = Field(
        14,
        ge=MARGIN_DAYS_MIN,
        le=3650,
        description="days that what guards against repeats is kept beyond its topic's retention",
    )

    worker_bind: str = Field("127.0.0.1", min_length=1, description="address of Faust's web; it has no authentication")
    worker_port: Port = Field(6066, description="first worker's web port; each further movement takes the next")
    worker_shutdown_timeout_s: Seconds = Field(60, gt=0, description="after SIGTERM a worker may finish for this long")
    worker_unassigned_timeout_s: Seconds = Field(30, gt=0, description="without a partition for this long = not ready")
    worker_stalled_s_max: Seconds = Field(
        60, gt=0, description="a worker whose event loop stands still so long is ended"
    )
    worker_restart_wait_max_s: Seconds = Field(30, gt=0, description="longest wait before a crashed worker restarts")
    bridge_host: str = Field("127.0.0.1", min_length=1, description="address the webhook bridge listens on")
    bridge_port: Port = Field(8081, description="port of the webhook bridge")
    api_host: str = Field("127.0.0.1", min_length=1, description="address the API listens on")
    api_port: Port = Field(8080, description="port of the API")

    @check("chain_ids", "usdc_contracts", "finality_depths_blocks")
    @classmethod
    def _over_network(cls, given: dict[Chain, Any], info: ValidationInfo) -> dict[Chain, Any]:
        """What is given replaces the network's own value chain by chain, so one override does not unset the others."""
        assert info.field_name is not None
        if any(type(value) is int and value < 1 for value in given.values()):
            raise ValueError("each number must be above zero")
        if info.field_name == "usdc_contracts":
            given = {chain: evm_address(chain, value) for chain, value in given.items()}
        return {**network_default(info.field_name, info.data.get("network", "testnet")), **given}

    @check("ledger_shards")
    @classmethod
    def _hot_types(cls, given: dict[str, int]) -> dict[str, int]:
        named = (*CUSTOMERS, AccountType.CUSTODY_USDC, AccountType.GAS_COINS)
        known = [type.value for type in AccountType if type not in named]
        if unknown := [type for type in given if type not in known]:
            raise ValueError(f"{unknown[0][:40]} has no shards; there are {', '.join(known)}")
        return given

    @check("circle_api_key", "circle_mint_api_key")
    @classmethod
    def _key_of_network(cls, key: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        """Circle has one host for both networks: only the key's prefix keeps test settings away from real money."""
        foreign = {"testnet": ("LIVE_API_KEY",), "mainnet": ("TEST_API_KEY", "SAND_API_KEY")}
        prefix = key.get_secret_value().partition(":")[0] if key is not None else ""
        if prefix in foreign.get(info.data.get("network", ""), ()):
            raise ValueError(f"network is {info.data['network']}, and a {prefix} belongs to the other one")
        return key

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.call_lease_s <= self.call_timeout_s:
            raise ValueError(f"{PREFIX}CALL_LEASE_S must be longer than {PREFIX}CALL_TIMEOUT_S")
        if self.alpaca_api_key is not None and self.network == "mainnet" and ".sandbox." in self.alpaca_api_url:
            raise ValueError(f"{PREFIX}ALPACA_API_URL is Alpaca's sandbox, and network is mainnet")
        if self.circle_mint_api_url and self.network == "mainnet" and "-sandbox." in self.circle_mint_api_url:
            raise ValueError(f"{PREFIX}CIRCLE_MINT_API_URL is Circle's sandbox, and network is mainnet")
        names = ("circle_api_url", "circle_mint_api_url", "alpaca_api_url")
        for name in names if self.network == "mainnet" else ():
            if (url := getattr(self, name)) is not None and not is_private(url):
                raise ValueError(f"{PREFIX}{name.upper()} must be https:// on mainnet: it is sent our key")
        if self.circle_sns_url is not None and self.network == "mainnet":
            raise ValueError(f"{PREFIX}CIRCLE_SNS_URL is for sandboxes: on mainnet only Amazon is believed")
        for chain in self.rpc_urls:
            if chain not in self.usdc_contracts:
                raise ValueError(f"{PREFIX}USDC_CONTRACTS must name USDC's contract on {chain} ({self.network})")
        if self.call_retry_max_s < self.call_retry_first_s:
            raise ValueError(f"{PREFIX}CALL_RETRY_MAX_S must not be shorter than {PREFIX}CALL_RETRY_FIRST_S")
        return self

    @model_validator(mode="after")
    def _beside_legacy(self) -> Self:
        try:
            legacy = self.legacy
        except ValueError as error:
            raise ValueError(
                f"{PREFIX}LEGACY_TABLE, {PREFIX}LEGACY_USER_COLUMN, {PREFIX}LEGACY_COLUMNS: {error}"
            ) from None
        if self.ledger_shadow_mode and legacy is None:
            raise ValueError(f"{PREFIX}LEGACY_TABLE must name the table that LEDGER_SHADOW_MODE writes")
        return self

    @property
    def legacy(self) -> Legacy | None:
        """The legacy table; None when there is none. ValueError: a name is wrong."""
        if self.legacy_table is None:
            return None
        return Legacy(
            self.legacy_table,
            self.legacy_user_column,
            self.legacy_user_type,
            self.legacy_columns,
            self.legacy_amounts == "integer",
            self.legacy_digits,
        )

    @model_validator(mode="after")
    def _withdrawable(self) -> Self:
        for chain in self.withdrawal_chains:
            if chain not in WITHDRAWAL_CHAINS:
                raise ValueError(
                    f"{PREFIX}WITHDRAWAL_CHAINS: no withdrawals by {chain}; there are {', '.join(WITHDRAWAL_CHAINS)}"
                )
            if chain not in self.usdc_contracts:
                raise ValueError(f"{PREFIX}USDC_CONTRACTS must name USDC's contract on {chain} ({self.network})")
            if chain not in self.rpc_urls:
                raise ValueError(f"{PREFIX}RPC_URLS must name an endpoint of {chain}, which withdrawals leave by")
            if is_mainnet(chain, self.chain_ids[chain]) and not self.allow_mainnet:
                raise ValueError(f"{PREFIX}ALLOW_MAINNET must be true for withdrawals by {chain} on the mainnet")
        if unused := [chain for chain in self.gas_top_ups if chain not in self.withdrawal_chains]:
            raise ValueError(f"{PREFIX}GAS_TOP_UPS: {unused[0]} is not in {PREFIX}WITHDRAWAL_CHAINS")
        return self

    @model_validator(mode="after")
    def _by_custodian(self) -> Self:
        if unnamed := [chain for chain in self.circle_withdrawal_wallets if chain not in self.circle_usdc_token_ids]:
            raise ValueError(f"{PREFIX}CIRCLE_USDC_TOKEN_IDS must name USDC on {unnamed[0]}, which Circle sends by")
        if self.circle_withdrawal_wallets and self.network == "mainnet" and not self.allow_mainnet:
            raise ValueError(f"{PREFIX}ALLOW_MAINNET must be true for withdrawals by Circle on the mainnet")
        return self

    @property
    def read_chains(self) -> tuple[Chain, ...]:
        """Chains we have endpoints for; on the others the custodian's word is finality."""
        return tuple(chain for chain in EVM_CHAINS if chain in self.rpc_urls)

    def shards_of(self, type: AccountType) -> int:
        """How many rows an account of ours has. A count may grow at any time: a balance is the sum of all shards there are."""
        return self.ledger_shards.get(type, self.buffer_shards if type is AccountType.SYSTEM_BUFFER_USDC else 1)

    def require(self, *fields: str) -> None:
        """Each process names what it cannot run without. Raises ConfigError with all that are unset."""
        unset = [field for field in fields if getattr(self, field) in (None, {}, ())]
        if unset:
            raise ConfigError(tuple(Problem(_shown_name(field), f"is not set; {_help(field)}") for field in unset))

    def secret(self, field: str) -> str:
        """The secret's own text, for the one place that hands it to its user. Raises ConfigError when it is unset."""
        self.require(field)
        value: SecretStr = getattr(self, field)
        return value.get_secret_value()


def load_settings(*, env_file: Path | None = Path(".env"), **overrides: Any) -> Settings:
    """Settings from `overrides` (by field name) over the environment over `env_file`. Raises ConfigError."""
    unknown = _unknown(_given(env_file)) + tuple(
        Problem(name, "no setting has this name") for name in overrides if name not in Settings.model_fields
    )
    try:
        settings = Settings(_env_file=env_file, **overrides)
    except ValidationError as error:
        raise ConfigError(unknown + _problems(error)) from None
    if unknown:
        raise ConfigError(unknown)
    return settings


def names_without_effect(env_file: Path | None = Path(".env")) -> tuple[Problem, ...]:
    """Names of the source documents that are set and change nothing, with the reason."""
    given = _given(env_file)
    return tuple(Problem(name, why) for name, why in WITHOUT_EFFECT.items() if name in given)


def _given(env_file: Path | None) -> frozenset[str]:
    try:
        from_file = dotenv_values(env_file) if env_file is not None and env_file.is_file() else {}
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError((Problem(str(env_file), f"cannot be read: {why}"),)) from None
    return frozenset({*os.environ, *from_file})


def _unknown(given: frozenset[str]) -> tuple[Problem, ...]:
    """A misspelt setting would otherwise be its default in silence."""
    known = [PREFIX + field.upper() for field in Settings.model_fields]
    problems = []
    for name in sorted(given):
        if name.startswith(PREFIX) and not name.startswith(_NOT_SETTINGS) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(Problem(name, "no setting has this name" + (f"; did you mean {near[0]}?" if near else "")))
    return tuple(problems)


def _problems(error: ValidationError) -> tuple[Problem, ...]:
    fields = {PREFIX + field.upper(): field for field in Settings.model_fields}
    fields |= {also: field for field, also in ALSO_CALLED.items()}
    problems = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        text = each["msg"].removeprefix("Value error, ")
        where = str(each["loc"][0]) if each["loc"] else ""
        field = fields.get(where.upper(), where)
        if field not in Settings.model_fields:
            problems.append(Problem("settings", text))
            continue
        problem = Problem(_shown_name(field), f"{text}; {_help(field)}")
        if problem not in problems:
            problems.append(problem)
    return tuple(problems)


def _shown_name(field: str) -> str:
    also = ALSO_CALLED.get(field)
    return PREFIX + field.upper() + (f" (or {also})" if also else "")


def _help(field: str) -> str:
    return Settings.model_fields[field].description or ""
