"""A local stand-in for Sumsub that sends its signed webhooks: `python -m connectors.kyc.sandbox`."""

from connectors.kyc.sandbox.server import Delivery, SumsubSandbox, create_control

__all__ = ["Delivery", "SumsubSandbox", "create_control"]
