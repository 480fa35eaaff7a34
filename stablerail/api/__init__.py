"""Our own HTTP API: what a customer has, how a deposit came about, withdrawals, and the ledger.

app            the factory: routes, problems, health, metrics, documentation
routes         /v1, an endpoint each, read only: users and deposits
ledger_routes  … accounts, statements, transactions, the trial balance
withdrawal_routes, withdrawal_reads
               … withdrawals asked for, cancelled and read; limits
journal        what a commit of the API waits for before it is answered
reads          rows -> answers; the statements are in reads.sql
models         the answers' shapes
auth           which key may do what
bodies         how large a request may be
observe        trace id, access log, metrics of each request
"""

from stablerail.api.app import create_api

__all__ = ["create_api"]
