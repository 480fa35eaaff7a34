"""Logging and traces: structlog for us and for the libraries' loggers, secrets masked, every line with its trace id.

JSON, one object per line, to stderr; coloured console on a terminal. The order of the processors matters: the exception
becomes text before the mask, so that a password in a driver's message is masked too.
"""

from __future__ import annotations

import logging
import re
import secrets
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

import orjson
import structlog
from pydantic import SecretStr
from structlog.typing import EventDict, Processor, WrappedLogger

from topics import trace

if TYPE_CHECKING:
    from stablerail.tracing import Exported

MASK: Final = "********"

QUIET_LOGGERS: Final = ("aiokafka", "faust", "mode", "kafka", "asyncio", "uvicorn.access", "alembic.runtime.plugins")
"""At WARNING: they format a line per event or request otherwise, and only then drop it; the last has six for each start."""

_SECRET_NAME = re.compile(r"secret|key|token|authorization|password|passwd|ciphertext|dsn|cookie", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"(^|[_-])(id|ids)$|^(idempotency|partition|message)[_-]?key$", re.IGNORECASE)
"""A key's or token's id is no secret, and without it a line about a refused key says nothing."""
_URL_PASSWORD = re.compile(r"(?<=://)([^\s/@:]*):[^\s\"']+(?=@)")
_API_KEY = re.compile(r"\b(sr_[0-9a-f]{16}_)[0-9a-f]{64}\b|\b((?:TEST|LIVE|SAND)_API_KEY:)[^\s\"']+")
_NESTING_MAX: Final = 6


def configure_logging(
    log_format: Literal["auto", "json", "console"] = "auto",
    log_level: str = "info",
    stream: TextIO | None = None,
) -> None:
    """Sets up structlog and the standard library's root logger of this process. Calling it again replaces the set-up.

    Start uvicorn with `log_config=None` and Faust without a log level, so that neither puts its own handlers in.
    """
    stream = stream if stream is not None else sys.stderr
    console = stream.isatty() if log_format == "auto" else log_format == "console"
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor]
    if console:
        render = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    else:
        render = [structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer(_json)]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=before,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            mask_secrets,
            *render,
        ],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *(processor for processor in before if not isinstance(processor, structlog.stdlib.ExtraAdder)),
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # loggers are made at import, before the settings are read
    )


def _json(line: Any, **_: Any) -> str:
    return orjson.dumps(line, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()


def mask_secrets(logger: WrappedLogger, method: str, line: EventDict) -> EventDict:
    """Masks SecretStr values, values under a name that sounds secret, and passwords and keys inside texts."""
    for name, value in line.items():
        line[name] = _masked(name, value)
    return line


def _masked(name: str, value: Any, depth: int = 0) -> Any:
    if isinstance(value, SecretStr) or (value is not None and sounds_secret(name)):
        return MASK
    if isinstance(value, str):
        return masked_text(value)
    if depth >= _NESTING_MAX:
        return MASK
    if isinstance(value, Mapping):
        return {str(key): _masked(str(key), each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(name, each, depth + 1) for each in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return masked_text(str(value)) if isinstance(value, BaseException) else masked_text(repr(value))


def sounds_secret(name: str) -> bool:
    """Whether a value under this name must not be shown."""
    return _SECRET_NAME.search(name) is not None and _PLAIN_NAME.search(name) is None


def masked_text(text: str) -> str:
    """The text without passwords of URLs and without API keys of ours and of Circle."""
    text = _URL_PASSWORD.sub(rf"\1:{MASK}", text)
    return _API_KEY.sub(lambda match: (match[1] or match[2]) + MASK, text)


def new_traceparent() -> str:
    """A W3C traceparent that starts a trace, marked as sampled."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def child_traceparent(header: str | None) -> str:
    """The caller's trace, a new span, the caller's flags; a new trace when the header is absent or not one."""
    received = trace.read_traceparent(header)
    return new_traceparent() if received is None else trace.child(received, secrets.token_hex(8))


def exported(url: str | None, service: str) -> Exported | None:
    """Where spans go; None where no collector is named: then none is made, and the SDK, half a second, is not imported."""
    if url is None:
        return None
    from stablerail.tracing import Exported

    return Exported(url, service)
