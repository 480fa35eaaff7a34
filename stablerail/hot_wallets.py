"""The keys that sign withdrawals, by the settings."""

from __future__ import annotations

from chain.errors import KeystoreError, SignerError, WrongPassword, WrongSigner
from chain.keys import load_key, needs_password
from chain.signer import Signer
from stablerail.config import PREFIX, ConfigError, Problem, Settings


def hot_wallet(settings: Settings) -> Signer:
    """The signer that the settings name. It may take seconds. Raises ConfigError with the setting that is wrong."""
    settings.require("withdrawal_keystore")
    source = settings.withdrawal_keystore
    assert source is not None
    if needs_password(source):
        settings.require("withdrawal_keystore_password")
    try:
        return load_lane_key(settings, source, settings.withdrawal_signer)
    except (KeystoreError, SignerError) as error:
        at_fault: dict[type[Exception], str] = {
            WrongPassword: "WITHDRAWAL_KEYSTORE_PASSWORD",
            WrongSigner: "WITHDRAWAL_SIGNER",
        }
        name = at_fault.get(type(error), "WITHDRAWAL_KEYSTORE")
        raise ConfigError((Problem(PREFIX + name, error.detail),)) from None


def load_lane_key(settings: Settings, source: str, expected: str | None = None) -> Signer:
    """As `chain.keys.load_key`. One password opens every keystore; where none is set it opens none."""
    password = settings.withdrawal_keystore_password
    return load_key(source, password.get_secret_value() if password is not None else "", expected)
