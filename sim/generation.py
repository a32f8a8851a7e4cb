"""One request between the simulated engine and its client: emissions in, answers out, and what breaks on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sim.answers import Answer, Usage, encode_json
from sim.driver import EngineDriver
from sim.faults import Faults
from sim.http1 import Reply
from sim.requests import Emission, Summary
from sim.responses_api import StoredResponse
from sim.tokens import decode, no_tokens

# Time for the last chunk to leave before the connection is broken: an RST takes unsent bytes with it.
RESET_DELAY_S: Final = 0.01


class Surroundings:
    """What all generations of one front end share. ``tells_cached``: usage names the cached tokens."""

    __slots__ = ("driver", "faults", "later", "tells_cached")

    def __init__(
        self,
        *,
        driver: EngineDriver,
        faults: Callable[[], Faults],
        later: Callable[[float, Callable[[], None]], object],
        tells_cached: bool,
    ) -> None:
        self.driver = driver
        self.faults = faults
        self.later = later
        self.tells_cached = tells_cached


class Generation:
    """One request between the engine and its client. ``reply`` is None for responses made in the background."""

    __slots__ = ("_answer", "_around", "_broken", "_id", "_reply", "_sent", "_stored", "_streams", "_tokens")

    def __init__(
        self,
        request_id: str,
        answer: Answer,
        *,
        around: Surroundings,
        reply: Reply | None,
        streams: bool,
        stored: StoredResponse | None,
    ) -> None:
        self._id = request_id
        self._answer = answer
        self._around = around
        self._reply = reply
        self._streams = streams
        self._stored = stored
        self._tokens = no_tokens()
        self._sent = 0
        self._broken = False

    def abort(self) -> None:
        """The client has gone: the engine drops the request at once."""
        self._around.driver.abort(self._id)
        if self._stored is not None:
            self._stored.cancel()

    def cancel(self) -> None:
        """A second request cancels this one: its own client gets a clean end."""
        self.abort()
        if self._reply is None or self._stored is None:
            return
        if self._streams:
            self._reply.end()
        else:
            self._reply.send(encode_json(self._stored.as_json()))

    def deliver(self, emission: Emission) -> None:
        """Pass on what the engine made."""
        reason, summary = emission.finish_reason, emission.summary
        if not self._streams:
            self._tokens += emission.token_ids
            if reason is not None and summary is not None:
                body = self._answer.whole(decode(self._tokens), reason, self._usage(summary))
                if self._reply is not None:
                    self._reply.send(body)
            return
        pieces = self._answer.opening() if emission.first else []
        text = decode(emission.token_ids)
        if reason is not None and summary is not None:
            pieces += self._answer.closing(text, reason, self._usage(summary))
        else:
            pieces += self._answer.piece(text, None)
        self._stream(pieces, last=reason is not None)

    def _usage(self, summary: Summary) -> Usage:
        cached = summary.cached_tokens if self._around.tells_cached else None
        return Usage(summary.prompt_tokens, summary.generated_tokens, cached)

    def _stream(self, pieces: list[bytes], *, last: bool) -> None:
        reply, limit = self._reply, self._around.faults().reset_after_chunks
        if reply is None or self._broken:
            return
        if limit is not None and self._sent + len(pieces) >= limit:
            self._broken = True
            reply.write(pieces[: max(0, limit - self._sent)])
            self._around.later(RESET_DELAY_S, reply.reset)
            return
        self._sent += len(pieces)
        reply.write(pieces)
        if last:
            reply.end()
