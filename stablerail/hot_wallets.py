"""The keys that sign withdrawals, by the settings."""

from __future__ import annotations

from chain.errors import KeystoreError, KeyUnavailable, SignerError, WrongPassword, WrongSigner
from chain.keys import load_key, needs_password
from chain.signer import Signer
from stablerail.config import PREFIX, ConfigError, Problem, Settings


def hot_wallet(settings: Settings) -> Signer:
    """The signer that the settings name. It may take seconds. Raises ConfigError with the setting that is wrong, KeyUnavailable."""
    return _named(settings, "withdrawal_keystore", settings.withdrawal_signer)


def gas_account(settings: Settings, hot_wallet: Signer) -> Signer:
    """The signer that gives coins to lanes. Raises ConfigError as well where it is the one that signs withdrawals."""
    signer = _named(settings, "gas_keystore")
    if signer.address == hot_wallet.address:
        raise ConfigError((Problem(PREFIX + "GAS_KEYSTORE", "must be of another key than WITHDRAWAL_KEYSTORE"),))
    return signer


def _named(settings: Settings, field: str, expected: str | None = None) -> Signer:
    settings.require(field)
    source: str = getattr(settings, field)
    if needs_password(source):
        settings.require("withdrawal_keystore_password")
    try:
        return load_lane_key(settings, source, expected)
    except KeyUnavailable as error:  # the next look may find it, and no setting is wrong
        raise KeyUnavailable(f"{PREFIX}{field.upper()}: {error.detail}") from None
    except (KeystoreError, SignerError) as error:
        at_fault: dict[type[Exception], str] = {
            WrongPassword: "WITHDRAWAL_KEYSTORE_PASSWORD",
            WrongSigner: "WITHDRAWAL_SIGNER",
        }
        name = at_fault.get(type(error), field.upper())
        raise ConfigError((Problem(PREFIX + name, error.detail),)) from None


def load_lane_key(settings: Settings, source: str, expected: str | None = None) -> Signer:
    """As `chain.keys.load_key`. One password opens every keystore; where none is set it opens none."""
    password = settings.withdrawal_keystore_password
    return load_key(source, password.get_secret_value() if password is not None else "", expected)
