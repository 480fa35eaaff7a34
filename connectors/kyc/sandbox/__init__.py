"""A local stand-in for KYC vendors that sends their signed webhooks: `python -m connectors.kyc.sandbox`."""

from connectors.kyc.sandbox.server import Delivery, KycSandbox, create_control
from connectors.kyc.sandbox.vendors import VENDORS, OnfidoSandbox, PersonaSandbox, SumsubSandbox

__all__ = ["VENDORS", "Delivery", "KycSandbox", "OnfidoSandbox", "PersonaSandbox", "SumsubSandbox", "create_control"]
