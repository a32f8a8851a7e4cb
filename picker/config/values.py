"""The scalar values of a configuration file: durations, sizes, shares of memory, addresses, URLs and paths.

Each type parses the text a person writes, refuses with a sentence that says what to write instead, and prints itself
back in the same notation. Nothing here reads files or the environment; secrets live in `secrets.py`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|s|m|h))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_MAX_DURATION_S = 30 * 24 * 3600.0
_UNIT_BYTES = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,6})?) ?([KMGT]i?B|B)")
_NUMBER = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,6})?")
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?) ?%")
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")
_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class KnownNames:
    """Names a configuration may use, from the tables of policies and plugins. Sets of plain names."""

    policies: frozenset[str]
    filters: frozenset[str]
    scorers: frozenset[str]
    pickers: frozenset[str]


@dataclass(frozen=True, slots=True)
class Context:
    """What validators may see besides their own value. Made once per validation; `seen_endpoints` fills up."""

    environ: Mapping[str, str] = field(default_factory=dict)
    base_dir: Path = Path()
    known: KnownNames | None = None
    profiles: frozenset[str] = frozenset()
    credentials: frozenset[str] | None = None
    seen_endpoints: set[str] = field(default_factory=set)


def context_of(info: ValidationInfo) -> Context:
    """The context of the running validation; a neutral one when a model is built directly, as tests do."""
    return info.context if isinstance(info.context, Context) else Context()


def refuse(message: str, *, at: str = "", hide: bool = False) -> PydanticCustomError:
    """An error with exactly this text. `at` names the key below which is to blame; `hide` leaves the value out."""
    return PydanticCustomError("waypost", message, {"at_key": at, "hide": hide})


def parse_duration(value: object) -> float:
    """`50ms`, `2s`, `5m`, `1h` or `1m30s` in seconds."""
    if isinstance(value, str) and _DURATION.fullmatch(value):
        seconds = sum(
            float(number) / 1000 if unit == "ms" else float(number) * _UNIT_S[unit]
            for number, unit in _DURATION_PART.findall(value)
        )
        if seconds > _MAX_DURATION_S:
            raise refuse("must be at most 720h")
        return seconds
    text = _bare_number(value)
    hint = f"; did you mean {text}s?" if text else ""
    raise refuse(f"must be a duration with a unit, such as 50ms, 2s, 5m or 1h{hint}")


def _positive_duration(value: object) -> float:
    seconds = parse_duration(value)
    if seconds <= 0:
        raise refuse("must be longer than 0s")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest notation that `parse_duration` reads back."""
    if seconds and seconds < 1:
        return f"{seconds * 1000:.12g}ms"
    for unit, length in (("h", 3600), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds / length:.12g}{unit}"
    return f"{seconds:.15g}s"


def parse_size(value: object) -> int:
    """`64KiB`, `10MiB`, `4GiB` (or decimal `10MB`) in bytes."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match:
        size_bytes = int(float(match[1]) * _UNIT_BYTES[match[2]])
        if not 0 < size_bytes <= 2**50:
            raise refuse("must be between 1B and 1024TiB")
        return size_bytes
    text = _bare_number(value)
    hint = f"; did you mean {_size_guess(text)}?" if text else ""
    raise refuse(f"must be a size with a unit, such as 64KiB, 10MiB or 4GiB{hint}")


def _size_guess(text: str) -> str:
    number = float(text)
    return format_size(int(number)) if number.is_integer() and number >= 1024 else f"{text}MiB"


def format_size(size_bytes: int) -> str:
    """The largest binary unit that divides evenly."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _UNIT_BYTES[unit] == 0:
            return f"{size_bytes // _UNIT_BYTES[unit]}{unit}"
    return f"{size_bytes}B"


def _bare_number(value: object) -> str:
    if isinstance(value, bool):
        return ""
    text = str(value) if isinstance(value, int | float | str) else ""
    return text if _NUMBER.fullmatch(text) else ""


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """A bound on memory: a fixed number of bytes, or a ratio in (0, 1] of what the process may use."""

    size_bytes: int | None = None
    ratio: float | None = None

    def resolve(self, total_bytes: int) -> int:
        """The bound in bytes when the process may use `total_bytes`."""
        return self.size_bytes if self.size_bytes is not None else int(total_bytes * (self.ratio or 0.0))

    def __str__(self) -> str:
        return format_size(self.size_bytes) if self.size_bytes is not None else f"{(self.ratio or 0.0) * 100:g}%"


def parse_memory_bound(value: object) -> MemoryBound:
    """`25%` or a size."""
    if isinstance(value, MemoryBound):
        return value
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if match:
        ratio = float(match[1]) / 100
        if not 0 < ratio <= 1:
            raise refuse("must be between 1% and 100%")
        return MemoryBound(ratio=ratio)
    if isinstance(value, str) and _SIZE.fullmatch(value):
        return MemoryBound(size_bytes=parse_size(value))
    text = _bare_number(value)
    hint = f"; did you mean {text}%?" if text and 0 < float(text) <= 100 else ""
    raise refuse(f"must be a share such as 25% or a size such as 4GiB{hint}")


@dataclass(frozen=True, slots=True)
class HostPort:
    """An address to listen on. `host` has no brackets; `str()` puts them around IPv6."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_host_port(value: object) -> HostPort:
    """`127.0.0.1:8080`, `[::1]:8080`, `name:8080` or `:8080` (all IPv4 addresses)."""
    if isinstance(value, HostPort):
        return value
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if not match:
        text = _bare_number(value)
        hint = f"; did you mean 127.0.0.1:{text}?" if text else ""
        raise refuse(f'must be HOST:PORT, such as 127.0.0.1:8080 or "[::1]:8080"{hint}')
    if int(match["port"]) > 65535:
        raise refuse("must have a port of at most 65535")
    if match["v6"] is not None:
        if not is_ip(match["v6"], version=6):
            raise refuse("must have an IPv6 address between the brackets")
        return HostPort(match["v6"], int(match["port"]))
    return HostPort(parse_host(match["host"] or "0.0.0.0"), int(match["port"]))


def is_ip(text: str, *, version: int = 0) -> bool:
    """Whether `text` is an IP address, of this version if one is given."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return version in (0, address.version)


def parse_service(value: object) -> HostPort:
    """`name:8000`: a host name and the port of every address behind it."""
    parsed = parse_host_port(value)
    if not parsed.host or is_ip(parsed.host) or not parsed.port:
        raise refuse("must be NAME:PORT with a host name and a port other than 0")
    return parsed


def parse_host(value: object) -> str:
    """An IP address without brackets, or a host name."""
    if isinstance(value, str) and len(value) <= 253 and (is_ip(value) or _HOST_NAME.fullmatch(value)):
        looks_numeric = value.replace(".", "").isdigit()
        if is_ip(value) or not looks_numeric:
            return value
    raise refuse("must be an IP address or a host name")


def _split_url(value: object, *, example: str) -> SplitResult:
    if not isinstance(value, str):
        raise refuse(f"must be a URL, such as {example}")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise refuse(f"must be a URL, such as {example}") from None
    if "@" in parts.netloc:
        raise refuse("must not hold a user or password; name an entry of credentials: instead")
    if parts.scheme not in ("http", "https"):
        bare = re.fullmatch(r"[A-Za-z0-9_.-]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}", value)
        hint = f"; did you mean http://{value}?" if bare else ""
        raise refuse(f"must start with http:// or https://{hint}")
    if not parts.hostname or port == 0 or any(c.isspace() or not c.isprintable() for c in value):
        raise refuse(f"must be a URL, such as {example}")
    try:
        parse_host(parts.hostname)
    except PydanticCustomError:
        raise refuse("must have an IP address or a host name") from None
    return parts


def parse_endpoint_url(value: object) -> str:
    """Scheme, host and port of a model server, without a path."""
    parts = _split_url(value, example="http://10.0.0.1:8000")
    root = f"{parts.scheme}://{parts.netloc}"
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise refuse(f"must have no path; did you mean {root}?")
    return root


def parse_page_url(value: object) -> str:
    """A URL with an optional path, such as that of a metrics page."""
    parts = _split_url(value, example="http://10.0.0.1:8002/metrics")
    if parts.fragment:
        raise refuse("must have no #fragment")
    return parts.geturl()


def _path(value: object, info: ValidationInfo) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise refuse("must be a path of a file or directory")
    return context_of(info).base_dir / value


def not_bool(value: Any) -> Any:
    """Refuse true and false where a number is wanted; Python counts them as 1 and 0."""
    if isinstance(value, bool):
        raise refuse("must be a number")
    return value


def _text_schema(pattern: str, *examples: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$", "examples": list(examples)})


_DURATION_SCHEMA = _text_schema(_DURATION.pattern, "50ms", "2s", "5m", "1h")
_SHOW_DURATION = PlainSerializer(format_duration, return_type=str)

Duration = Annotated[float, PlainValidator(_positive_duration), _SHOW_DURATION, _DURATION_SCHEMA]
"""Seconds, more than 0."""
Delay = Annotated[float, PlainValidator(parse_duration), _SHOW_DURATION, _DURATION_SCHEMA]
"""Seconds, 0 allowed."""
Size = Annotated[
    int,
    PlainValidator(parse_size),
    PlainSerializer(format_size, return_type=str),
    _text_schema(_SIZE.pattern, "64KiB", "10MiB", "4GiB"),
]
"""Bytes."""
Memory = Annotated[
    MemoryBound,
    PlainValidator(parse_memory_bound),
    PlainSerializer(str, return_type=str),
    _text_schema(f"({_SHARE.pattern}|{_SIZE.pattern})", "25%", "4GiB"),
]
Address = Annotated[
    HostPort,
    PlainValidator(parse_host_port),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["127.0.0.1:8080", "[::1]:8080", ":8080"]}),
]
ServiceName = Annotated[
    HostPort,
    PlainValidator(parse_service),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["vllm.default.svc.cluster.local:8000"]}),
]
"""A host name with many addresses, and their port."""
Host = Annotated[str, PlainValidator(parse_host), WithJsonSchema({"type": "string", "examples": ["0.0.0.0", "::"]})]
EndpointUrl = Annotated[
    str, PlainValidator(parse_endpoint_url), WithJsonSchema({"type": "string", "pattern": "^https?://"})
]
PageUrl = Annotated[str, PlainValidator(parse_page_url), WithJsonSchema({"type": "string", "pattern": "^https?://"})]
FilePath = Annotated[
    Path, PlainValidator(_path), PlainSerializer(str, return_type=str), WithJsonSchema({"type": "string"})
]
"""A path; relative ones start at the directory of the configuration file."""
Count = Annotated[int, BeforeValidator(not_bool), Field(ge=1, le=10_000_000)]
Port = Annotated[int, BeforeValidator(not_bool), Field(ge=0, le=65535)]
"""A TCP port; 0 lets the system choose."""
Weight = Annotated[float, BeforeValidator(not_bool), Field(ge=0, le=1_000_000, allow_inf_nan=False)]
