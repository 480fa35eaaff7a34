"""The bridge as `stablerail bridge` serves it, but for what comes after the signature: nothing is translated or published."""

from __future__ import annotations

from unittest.mock import patch

from connectors.circle.webhooks import CircleWebhooks
from stablerail.cli import app

if __name__ == "__main__":
    with patch.object(CircleWebhooks, "translate", lambda _source, _body: ()):
        app(["bridge"])
