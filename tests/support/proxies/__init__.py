"""TCP proxies that understand what they carry, so that a crash test can stop a worker at an exact boundary.

The worker under test reaches PostgreSQL, Kafka and the partners' sandboxes only through these. They run in the test's
process, in threads of their own, and outlive a worker that is killed. A test holds the n-th COMMIT, Produce or HTTP
request before it is forwarded, or before its reply goes back:

    with PostgresProxy(host, port) as proxy:
        hold = proxy.hold(commit_after("insert into outbox"), "reply")
        ...start a worker on proxy.host, proxy.port...
        frame = await hold.wait_hit_async()     # the server has committed, the worker does not know
        worker.kill(); worker.wait()
        assert not hold.release()               # nobody was left to take the reply
"""

from tests.support.proxies.base import Proxy
from tests.support.proxies.hold import Frame, Hold, Match, Where
from tests.support.proxies.http import HttpProxy, http_request
from tests.support.proxies.kafka import KafkaProxy, kafka_request, offset_commit, produce
from tests.support.proxies.postgres import PostgresProxy, commit, commit_after, sql_contains

__all__ = [
    "Frame",
    "Hold",
    "HttpProxy",
    "KafkaProxy",
    "Match",
    "PostgresProxy",
    "Proxy",
    "Where",
    "commit",
    "commit_after",
    "http_request",
    "kafka_request",
    "offset_commit",
    "produce",
    "sql_contains",
]
