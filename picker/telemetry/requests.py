"""The end of a request as metrics and logs see it: one record, one log line, the same for both doors."""

from __future__ import annotations

from picker.core.events import Outcome
from picker.core.record import LEFT, RequestRecord
from picker.telemetry.logs import Log
from picker.telemetry.metrics import Metrics


def record_request(record: RequestRecord, metrics: Metrics, log: Log) -> None:
    """Counts and logs one request. Prompts and headers are not in the record, so they cannot get into a log."""
    label, counters = metrics.model(record.model if record.endpoint is not None else None)
    counters.count(label, record.status)
    if record.outcome != LEFT:
        counters.duration_s.observe(record.duration_s)
    if record.first_byte_s is not None:
        counters.first_byte_s.observe(record.first_byte_s)
    if record.outcome == Outcome.CLIENT_GONE:
        metrics.disconnects.inc()
    if metrics.reference is not None:
        metrics.reference.record(record)
    usage = record.usage
    if usage is not None:
        counters.prompt_tokens.inc(usage.prompt_tokens or 0)
        counters.output_tokens.inc(usage.output_tokens or 0)
        counters.cached_tokens.inc(usage.cached_tokens or 0)
    log.info(
        "request",
        id=record.id,
        path=record.path,
        model=record.model,
        endpoint=record.endpoint,
        status=record.status,
        outcome=record.outcome,
        stream=record.stream,
        attempts=record.attempts,
        ttft_ms=round(record.first_byte_s * 1000, 3) if record.first_byte_s is not None else None,
        duration_ms=round(record.duration_s * 1000, 3),
        output_tokens=usage.output_tokens if usage is not None else None,
    )
