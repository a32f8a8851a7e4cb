"""Structured logs: JSON lines off a terminal, coloured text on one; one line per request.

Callers pass fields, never sentences with values inside, and never prompts, headers or secrets.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import msgspec
import structlog
from structlog.typing import FilteringBoundLogger, Processor

Log = FilteringBoundLogger

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Stamp:
    """Adds the time in UTC, ISO 8601 with milliseconds. The text of a second is made once."""

    __slots__ = ("_second", "_text")

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def __call__(self, logger: object, name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """The structlog processor."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        fields["timestamp"] = f"{self._text}.{int((now - second) * 1000):03d}Z"
        return fields


class LineBuffer:
    """A logger that writes all lines of one turn of the event loop at once: one system call instead of one per request.

    Outside a running loop lines are written at once.
    """

    __slots__ = ("_lines", "_loop", "_out")

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lines: list[str] = []
        # Where a flush is due. A loop that ended before its flush must not hold the lines of the next one back.
        self._loop: asyncio.AbstractEventLoop | None = None

    def msg(self, line: str) -> None:
        """Takes one line."""
        self._lines.append(line)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._flush()
            return
        if self._loop is not loop:
            self._loop = loop
            loop.call_soon(self._flush)

    debug = info = warning = error = critical = exception = log = msg

    def _flush(self) -> None:
        self._loop = None
        lines, self._lines = self._lines, []
        if not lines:
            return
        self._out.write("\n".join(lines) + "\n")
        self._out.flush()


def configure(level: str, *, style: str = "auto", stream: TextIO | None = None) -> Log:
    """The logger of this process. `style` is auto, json or console; `stream` defaults to stderr.

    Libraries' own loggers are cut to errors: uvicorn's and aiohttp's lines say nothing that ours do not.
    """
    out = stream or sys.stderr
    console = style == "console" or (style == "auto" and out.isatty())
    shared: list[Processor] = [structlog.processors.add_log_level, Stamp()]
    logging.basicConfig(level=logging.ERROR, stream=out, format="%(message)s", force=True)
    for noisy in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "aiohttp", "grpc"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty())
        if console
        else structlog.processors.JSONRenderer(serializer=_dumps)
    )
    logger = structlog.wrap_logger(
        LineBuffer(out),
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return cast(Log, logger)


def _dumps(fields: object, **_: object) -> str:
    try:
        return msgspec.json.encode(fields, enc_hook=str).decode()
    except UnicodeEncodeError:
        # Names of files may hold bytes that are no text.
        return json.dumps(fields, default=str)
