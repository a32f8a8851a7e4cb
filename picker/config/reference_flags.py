"""The flags of the reference endpoint picker: what each of them means here.

One table, `FLAGS`, and `settings`, which turns flags as they were given into values of the configuration. Prints
nothing; reads the file that `--config-file` names. Facts: the options of llm-d-router and of the Gateway API Inference
Extension, and the arguments KServe 0.16 starts them with.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from picker.config import go_values
from picker.config.fields import walk
from picker.config.flag_values import FlagValues, Given
from picker.config.locate import parse_document, read_document
from picker.config.model import Config
from picker.config.reference_config import picker_config_values
from picker.config.values import format_duration


class Kind(enum.Enum):
    """What a flag's value looks like; the text stands for it in the help."""

    TEXT = "TEXT"
    NUMBER = "N"
    SWITCH = "[BOOL]"
    DURATION = "DURATION"
    SIZE = "SIZE"


@dataclass(frozen=True, slots=True)
class Flag:
    """What is done about one flag: it sets `path`, is `ignored` or `refused` for a reason, or is read by name."""

    kind: Kind = Kind.TEXT
    path: str = ""
    text: str = ""
    inverted: bool = False
    least_s: float = 0.001
    ignored: str = ""
    quiet: bool | None = None
    """With this value of a switch nothing is ignored."""
    refused: str = ""


_PLAIN_PAGES = "the metrics port has no TLS; leave the flag out and guard the port with a NetworkPolicy or a mesh"
_PER_ENGINE = "engines are recognised, each has its own metrics"

FLAGS: Mapping[str, Flag] = {
    "bind": Flag(path="picker.host"),
    "grpc-port": Flag(Kind.NUMBER, "picker.grpc_port"),
    "grpc-health-port": Flag(Kind.NUMBER, "picker.grpc_health_port"),
    "metrics-port": Flag(Kind.NUMBER, "picker.metrics_port"),
    "secure-serving": Flag(Kind.SWITCH, "picker.secure_serving"),
    "cert-path": Flag(path="picker.cert_path"),
    "enable-cert-reload": Flag(Kind.SWITCH, "picker.cert_reload"),
    "response-path": Flag(path="picker.response_path"),
    "conformance": Flag(Kind.SWITCH, "picker.conformance"),
    "emit-endpoint-scores": Flag(Kind.SWITCH, "picker.emit_scores"),
    "disable-endpoint-subset-filter": Flag(
        Kind.SWITCH, "picker.subset_filter", "Do not obey the endpoint subset the proxy names.", inverted=True
    ),
    "grpc-max-recv-msg-size": Flag(Kind.SIZE, "picker.max_message"),
    "refresh-metrics-interval": Flag(Kind.DURATION, "scrape.busy_interval", least_s=0.05),
    "metrics-staleness-threshold": Flag(Kind.DURATION, "scrape.stale_after"),
    "drain-timeout": Flag(Kind.DURATION, "drain.timeout"),
    "pool-name": Flag(text="Name of the InferencePool to follow."),
    "pool-namespace": Flag(path="kubernetes.namespace"),
    "pool-group": Flag(text="API group of the InferencePool."),
    "model-server-metrics-scheme": Flag(text="http or https, for the metrics of the pool's pods."),
    "model-server-metrics-port": Flag(Kind.NUMBER, text="Port of their metrics, if other than the pool's."),
    "model-server-metrics-path": Flag(text="Path of their metrics."),
    "model-server-metrics-https-insecure-skip-verify": Flag(
        Kind.SWITCH, text="Do not check the certificates of https metrics. [true]"
    ),
    "config-file": Flag(text="An EndpointPickerConfig, whose scheduling profile becomes the policy."),
    "config-text": Flag(text="The same as text."),
    "v": Flag(Kind.NUMBER, text="Verbosity: from 4 up the log level is debug."),
    "zap-log-level": Flag(text="debug, info or error."),
    "zap-encoder": Flag(text="json or console."),
    "zap-devel": Flag(Kind.SWITCH, ignored="see --log-format"),
    "zap-stacktrace-level": Flag(ignored="errors have their traces"),
    "zap-time-encoding": Flag(ignored="times are ISO 8601"),
    "ha-enable-leader-election": Flag(Kind.SWITCH, ignored="all replicas are active", quiet=False),
    "metrics-endpoint-auth": Flag(Kind.SWITCH, ignored="metrics are served without authentication", quiet=False),
    "health-checking": Flag(Kind.SWITCH, ignored="gRPC health is always on", quiet=True),
    "tracing": Flag(Kind.SWITCH, ignored="there are no traces", quiet=False),
    "enable-pprof": Flag(Kind.SWITCH, ignored="there is no pprof", quiet=False),
    "enable-grpc-stream-metrics": Flag(Kind.SWITCH, ignored="streams have metrics of their own", quiet=False),
    "allow-experimental-plugins": Flag(Kind.SWITCH, ignored="plugins have no such grades", quiet=False),
    "fairness-id-metric-label-limit": Flag(Kind.NUMBER, ignored="metrics have no such label"),
    "enable-multi-engine": Flag(Kind.SWITCH, ignored=_PER_ENGINE, quiet=True),
    "engine-label-key": Flag(ignored=_PER_ENGINE),
    "refresh-prometheus-metrics-interval": Flag(Kind.DURATION, ignored="metrics are always current"),
    "grpc-max-send-msg-size": Flag(Kind.SIZE, ignored="replies are small"),
    "tls-min-version": Flag(ignored="TLS 1.2 and 1.3 are accepted"),
    "tls-cipher-suites": Flag(ignored="gRPC has its own list"),
    "total-queued-requests-metric": Flag(ignored=_PER_ENGINE),
    "total-running-requests-metric": Flag(ignored=_PER_ENGINE),
    "kv-cache-usage-percentage-metric": Flag(ignored=_PER_ENGINE),
    "lora-info-metric": Flag(ignored=_PER_ENGINE),
    "cache-info-metric": Flag(ignored=_PER_ENGINE),
    "metrics-cert-dir": Flag(refused=_PLAIN_PAGES),
    "metrics-client-ca-file": Flag(refused=_PLAIN_PAGES),
}


# What scrapes of idle endpoints wait if nobody says otherwise; busy ones must not wait longer.
_IDLE_S = Config().scrape.idle_interval
# The reference's DEBUG; 2 is its default, 5 its TRACE.
_DEBUG_VERBOSITY = 4
_ZAP_LEVELS = {"debug": "debug", "info": "info", "error": "error", "panic": "error"}


def settings(given: Mapping[str, Given], *, configured: bool) -> FlagValues:
    """What the flags of the table say, but for those that name pools.

    `configured` says whether a file or variable may have set what they need beside them.
    """
    said = FlagValues()
    ignored: list[str] = []
    for name, one in given.items():
        flag = FLAGS[name]
        if flag.refused:
            said.refuse(one.spelled, flag.refused)
        elif flag.ignored:
            if flag.quiet is None or go_values.switch(one.value) is not flag.quiet:
                ignored.append(f"{one.spelled} ({flag.ignored})")
        elif flag.path:
            _set(said, flag, one)
    _set_log(said, given)
    _set_policy(said, given)
    if said.values.get(("picker", "cert_reload")) is True and "cert-path" not in given and not configured:
        said.drop("picker.cert_reload")
        ignored.append(f"{given['enable-cert-reload'].spelled} (there is no --cert-path)")
    if ignored:
        said.warn(f"accepted without effect: {', '.join(ignored)}")
    return said


def _set(said: FlagValues, flag: Flag, one: Given) -> None:
    value: object = one.value
    if flag.kind is Kind.SWITCH:
        on = go_values.switch(one.value)
        if on is None:
            said.refuse(one.spelled, "must be true or false", one.value)
            return
        value = on is not flag.inverted
    elif flag.kind is Kind.DURATION:
        value = _in_our_notation(one.value, flag.least_s)
        if flag.path == "scrape.busy_interval" and (go_values.seconds(one.value) or 0.0) > _IDLE_S:
            said.put("scrape.idle_interval", value, one.spelled)
    elif flag.kind is Kind.SIZE:
        size = go_values.size_bytes(one.value)
        if size == 0:
            return  # The reference's word for "as it is".
        value = one.value if size is None else f"{size}B"
    said.put(flag.path, value, one.spelled)


def _in_our_notation(text: str, least_s: float) -> str:
    """A duration of Go in our notation; anything else as it is, for the configuration to refuse."""
    seconds = go_values.seconds(text)
    return text if seconds is None else format_duration(max(seconds, least_s))


def _set_log(said: FlagValues, given: Mapping[str, Given]) -> None:
    """`--zap-log-level` rules over `-v`; both know numbers that grow with what is logged."""
    for name in ("v", "zap-log-level"):
        one = given.get(name)
        if one is None:
            continue
        level = _ZAP_LEVELS.get(one.value) if name != "v" else None
        if level is None and re.fullmatch(r"-?[0-9]{1,9}", one.value):
            level = "debug" if int(one.value) >= _DEBUG_VERBOSITY else "info"
        if level is None:
            said.refuse(one.spelled, f"must be {'' if name == 'v' else 'debug, info, error or '}a number", one.value)
        else:
            said.put("log.level", level, one.spelled)
    encoder = given.get("zap-encoder")
    if encoder is not None:
        said.put("log.format", encoder.value, encoder.spelled)


def _set_policy(said: FlagValues, given: Mapping[str, Given]) -> None:
    file, text = given.get("config-file"), given.get("config-text")
    if file is not None and text is not None:
        said.refuse(text.spelled, f"cannot be given together with {file.spelled}")
    elif file is not None:
        said.add(picker_config_values(read_document(Path(file.value)), file.spelled))
    elif text is not None:
        said.add(picker_config_values(parse_document(text.value, name=text.spelled), text.spelled))


def help_rows() -> Iterator[tuple[str, str]]:
    """The flags that do something and what it is."""
    described = {".".join(map(str, path)): info.description or "" for path, info in walk(Config)}
    for name, flag in FLAGS.items():
        text = flag.text or described.get(flag.path, "")
        if text:
            yield f"{'--' if len(name) > 1 else '-'}{name} {flag.kind.value}", text
