"""Our own HTTP API: what a customer has, and how a deposit came about.

app         the factory: routes, problems, health, metrics, documentation
routes      /v1, an endpoint each, read only
reads       rows -> answers; the statements are in reads.sql
models      the answers' shapes
auth        which key may do what
observe     trace id, access log, metrics of each request
"""

from stablerail.api.app import create_api

__all__ = ["create_api"]
