"""The bytes that lie in Redis: load vectors, entries of streams, snapshots. Pure.

Other replicas may run another version, and anybody may write to Redis: whatever is not understood decodes to None.
Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from xxhash import xxh3_64_intdigest

from picker.signals.shared.settings import EndpointLoad, PodSnapshot

VERSION = 1
TAG_BYTES = 8
# Version, padding, epoch, sequence.
_VECTOR = struct.Struct("<B7xQQ")
# Hash of the endpoint id, requests, tokens, pending tokens. Ids have about 50 bytes in Kubernetes; readers know them.
_ROW = struct.Struct("<QIII")
# Tag of the secret, sequence.
_ENTRY = struct.Struct(f"<{TAG_BYTES}sQ")
_U32 = 2**32 - 1
# More endpoints than any fleet has.
_ROWS_MAX = 65_536


class Vector(msgspec.Struct, frozen=True):
    """The load of one replica: rows of endpoint hash and load."""

    epoch: int
    sequence: int
    rows: Sequence[tuple[int, int, int, int]]


def endpoint_hash(endpoint_id: str) -> int:
    """What stands for an endpoint in load vectors."""
    return xxh3_64_intdigest(endpoint_id.encode())


def secret_tag(secret: bytes) -> bytes:
    """Tells keys of one secret from those of another, and nothing else about it."""
    return hashlib.blake2b(secret, digest_size=TAG_BYTES).digest()


# -- loads -------------------------------------------------------------------------------------------------------------


def pack_rows(loads: Mapping[str, EndpointLoad]) -> bytes:
    """Loads without who says so; endpoints without load are left out. Figures beyond 32 bits are cut."""
    return b"".join(
        [
            _ROW.pack(endpoint_hash(name), _u32(load[0]), _u32(load[1]), _u32(load[2]))
            for name, load in loads.items()
            if any(load)
        ]
    )


def _u32(number: int) -> int:
    return 0 if number < 0 else min(number, _U32)


def pack_vector(epoch: int, sequence: int, rows: bytes) -> bytes:
    """One replica's load, as it lies in Redis."""
    return _VECTOR.pack(VERSION, epoch, sequence) + rows


def unpack_vector(data: object) -> Vector | None:
    """The other way round."""
    if not isinstance(data, bytes) or len(data) < _VECTOR.size or data[0] != VERSION:
        return None
    count, rest = divmod(len(data) - _VECTOR.size, _ROW.size)
    if rest or count > _ROWS_MAX:
        return None
    _, epoch, sequence = _VECTOR.unpack_from(data)
    return Vector(epoch, sequence, list(_ROW.iter_unpack(memoryview(data)[_VECTOR.size :])))


def sum_rows(vectors: Iterable[Vector], names: Mapping[int, str]) -> dict[str, EndpointLoad]:
    """All vectors together, by endpoint id. Endpoints we do not know get no requests from us and are left out."""
    sums: dict[int, tuple[int, int, int]] = {}
    for vector in vectors:
        for key, requests, tokens, pending in vector.rows:
            before = sums.get(key)
            if before is None:
                sums[key] = (requests, tokens, pending)
            else:
                sums[key] = (before[0] + requests, before[1] + tokens, before[2] + pending)
    return {names[key]: EndpointLoad(*load) for key, load in sums.items() if key in names}


# -- keys and entries --------------------------------------------------------------------------------------------------


def pack_keys(keys: Sequence[int]) -> bytes:
    """Keys as u64."""
    return struct.pack(f"<{len(keys)}Q", *keys)


def unpack_keys(data: bytes) -> tuple[int, ...] | None:
    """The other way round; None when these are not whole keys."""
    return None if len(data) % 8 else struct.unpack(f"<{len(data) // 8}Q", data)


def pack_entry(tag: bytes, sequence: int, body: bytes) -> bytes:
    """One entry of a stream."""
    return _ENTRY.pack(tag, sequence) + body


def unpack_entry(data: object) -> tuple[bytes, int, bytes] | None:
    """Tag, sequence and body."""
    if not isinstance(data, bytes) or len(data) < _ENTRY.size:
        return None
    tag, sequence = _ENTRY.unpack_from(data)
    return tag, sequence, data[_ENTRY.size :]


class RoutedPrompt(msgspec.Struct, frozen=True, array_like=True):
    """A prompt that was sent somewhere: its packed keys, from its beginning."""

    endpoint_id: str
    instance: str
    keys: bytes


_ROUTED = msgspec.msgpack.Decoder(list[RoutedPrompt])


def pack_routed(prompts: Sequence[RoutedPrompt]) -> bytes:
    """Several prompts as the body of an entry."""
    return msgspec.msgpack.encode(prompts)


def unpack_routed(body: bytes) -> list[RoutedPrompt] | None:
    """The other way round."""
    try:
        return _ROUTED.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


# -- snapshots ---------------------------------------------------------------------------------------------------------


class _Written(msgspec.Struct, frozen=True, array_like=True):
    version: int
    tag: bytes
    taken_ms: int
    instance: str
    block_tokens: int
    tiers: dict[int, bytes]


_WRITTEN = msgspec.msgpack.Decoder(_Written)
_LEAST, _MOST = -(2**63), 2**63 - 1


def pack_tiers(snapshot: PodSnapshot, keys_max: int) -> dict[int, bytes]:
    """The keys by tier, fastest first, `keys_max` in all."""
    tiers: dict[int, bytes] = {}
    for tier in sorted(snapshot.tiers):
        keys = snapshot.tiers[tier][:keys_max]
        keys_max -= len(keys)
        if keys:
            tiers[tier] = pack_keys(keys)
    return tiers


def pack_snapshot(tag: bytes, taken_at: float, snapshot: PodSnapshot, tiers: dict[int, bytes]) -> bytes:
    """A snapshot as it lies in Redis. `taken_at` is in seconds of the Unix time."""
    taken_ms = min(max(int(taken_at * 1000), _LEAST), _MOST)
    return msgspec.msgpack.encode(_Written(VERSION, tag, taken_ms, snapshot.instance, snapshot.block_tokens, tiers))


def unpack_snapshot(data: object, tag: bytes, instance: str) -> tuple[PodSnapshot, float] | None:
    """A snapshot of this secret and instance, and when it was taken; None when it is of others, or not understood."""
    if not isinstance(data, bytes):
        return None
    try:
        written = _WRITTEN.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if (written.version, written.tag, written.instance) != (VERSION, tag, instance):
        return None
    tiers: dict[int, Sequence[int]] = {}
    for tier, packed in written.tiers.items():
        keys = unpack_keys(packed)
        if keys is None:
            return None
        tiers[tier] = keys
    return PodSnapshot(instance, written.block_tokens, tiers), written.taken_ms / 1000
