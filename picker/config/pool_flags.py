"""The flags that name pools of pods, of both doors, as entries of `kubernetes.pools`.

What the entries mean is `kubernetes.py`'s matter; the reference endpoint picker's flags come in as they were given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from picker.config import go_values
from picker.config.flag_values import FlagValues, Given
from picker.config.kubernetes import POOL_GROUPS

MAX_PORTS = 8
"""As many as an InferencePool has."""
SELECTOR_POOL = "endpoint-selector"
"""The name of the pool that a label selector makes."""
METRICS_CREDENTIALS = "model-servers"
"""The entry of credentials: that pools read over https have when their certificates are not to be checked."""


def pool_values(
    pools: Sequence[str], selector: str | None, target_ports: Sequence[str], given: Mapping[str, Given]
) -> FlagValues:
    """The pools of `--pool`, `--endpoint-selector` and, in `given`, of the reference's flags by name."""
    said = FlagValues()
    entries: list[dict[str, object]] = [{"name": pool} for pool in pools]
    flags = ["--pool"] if pools else []
    name = given.get("pool-name")
    if name is not None:
        entries.append({"name": name.value, **_group(given, said)})
        flags.append(name.spelled)
    if selector:
        if name is not None:
            said.refuse("--endpoint-selector", f"cannot be given together with {name.spelled}: the pool has its own")
        entries.append({"name": SELECTOR_POOL, "selector": selector, "target_ports": _ports(target_ports, said)})
        flags.append("--endpoint-selector")
    elif target_ports:
        said.warn("--endpoint-target-ports: without effect, there is no --endpoint-selector")
    if not entries:
        idle = [one.spelled for flag, one in given.items() if flag.startswith("model-server-metrics-")]
        if idle:
            said.warn(f"{', '.join(idle)}: without effect, no flag names a pool")
        return said
    path = given.get("model-server-metrics-path")
    if path is not None:
        flags.append(path.spelled)  # What is wrong with it only the configuration finds.
    reading = _metrics(given, said)
    said.put("kubernetes.pools", [{**entry, **reading} for entry in entries], ", ".join(flags))
    return said


def _group(given: Mapping[str, Given], said: FlagValues) -> dict[str, object]:
    group = given.get("pool-group")
    if group is None:
        return {}
    if group.value not in POOL_GROUPS:
        said.refuse(group.spelled, f"must be {' or '.join(POOL_GROUPS)}", group.value)
    return {"group": group.value}


def _ports(texts: Sequence[str], said: FlagValues) -> list[int]:
    """The ports of `8000,8001`; the same one twice counts once."""
    flag = "--endpoint-target-ports"
    ports: dict[int, None] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        port = _port(part)
        if port is not None:
            ports[port] = None
        elif part:
            said.refuse(flag, "must be ports between 1 and 65535, such as 8000,8001", part)
    if not ports and not said.problems:
        said.refuse("--endpoint-selector", f"needs {flag} too, such as 8000 or 8000,8001")
    if len(ports) > MAX_PORTS:
        said.refuse(flag, f"must be at most {MAX_PORTS} ports")
    return list(ports)


def _port(text: str) -> int | None:
    port = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else 0
    return port if 1 <= port <= 65535 else None


def _metrics(given: Mapping[str, Given], said: FlagValues) -> dict[str, object]:
    """How the pods' metrics are read. By default the reference checks no certificates of theirs."""
    scheme, port = given.get("model-server-metrics-scheme"), given.get("model-server-metrics-port")
    path, skip = given.get("model-server-metrics-path"), given.get("model-server-metrics-https-insecure-skip-verify")
    reading: dict[str, object] = {}
    if port is not None and port.value != "0":
        reading["metrics_port"] = _port(port.value)
        if reading["metrics_port"] is None:
            said.refuse(port.spelled, "must be a port between 1 and 65535", port.value)
    if path is not None:
        reading["metrics_path"] = path.value
    unchecked = True if skip is None else go_values.switch(skip.value)
    if skip is not None and unchecked is None:
        said.refuse(skip.spelled, "must be true or false", skip.value)
    if scheme is None:
        return reading
    if scheme.value not in ("http", "https"):
        said.refuse(scheme.spelled, "must be http or https", scheme.value)
    reading["metrics_scheme"] = scheme.value
    if scheme.value == "https" and unchecked:
        said.put(("credentials", METRICS_CREDENTIALS, "verify"), False, skip.spelled if skip else scheme.spelled)
        reading["credentials"] = METRICS_CREDENTIALS
    if scheme.value == "https" and "metrics_port" not in reading:
        # One port does not speak both: probes and model lists are asked for on the same one.
        reading["scheme"] = "https"
    return reading
