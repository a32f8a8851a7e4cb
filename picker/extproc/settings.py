"""What an operator may set about the ext-proc door. Times in seconds, sizes in bytes; every bound has a default."""

from __future__ import annotations

import enum

import msgspec


class ResponsePath(enum.StrEnum):
    """OBSERVE stays on the stream to the end of the response; LEAVE closes it once the request is answered."""

    OBSERVE = "observe"
    LEAVE = "leave"


class SessionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one exchange.

    `fallbacks` is how many alternates follow the choice in the destination header; 0 because an ORIGINAL_DST cluster
    understands one address only. `hold_response_bytes` bounds how much of a plain JSON response is joined before it is
    passed on. `emit_scores` puts the scores of the ranked endpoints into the metadata. `conformance` lets a client
    choose endpoints and shows who served, as conformance tests of gateways want it. `receive_timeout_s` is for the
    client to send its body, `exchange_timeout_s` for us to decide.
    """

    response_path: ResponsePath = ResponsePath.OBSERVE
    fallbacks: int = 0
    use_subset: bool = True
    emit_scores: bool = False
    conformance: bool = False
    max_body_bytes: int = 32 * 1024 * 1024
    hold_response_bytes: int = 1024 * 1024
    receive_timeout_s: float = 60.0
    exchange_timeout_s: float = 10.0
    retry_after_ms: int = 1000


class TlsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """TLS towards the proxy. Without files a self-signed certificate is made at start: proxies of the Gateway API do
    not verify it. With `reload`, files are read again when they change.
    """

    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""
    reload: bool = True


class ExtProcSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the server. `tls` None serves plaintext; `health_port` None serves health on the main port only.

    `max_streams` exchanges run at once, holding at most `max_held_bytes` of bodies together; over either, new ones get
    a 429. Draining keeps the port open for `drain_settle_s` at least, until proxies saw the health change.
    """

    host: str = "0.0.0.0"
    port: int = 9002
    health_port: int | None = 9003
    tls: TlsSettings | None = TlsSettings()
    session: SessionSettings = SessionSettings()
    max_streams: int = 8192
    max_held_bytes: int = 1024 * 1024 * 1024
    max_message_bytes: int = 64 * 1024 * 1024
    drain_settle_s: float = 0.5
