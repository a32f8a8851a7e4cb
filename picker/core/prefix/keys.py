"""Keys of prefixes: chained hashes that stand for everything from the start of a prompt to the end of a block.

A key is `xxh3_64(block, seed=key of the block before)`. Replicas with the same secret agree on all keys, which never
leave the fleet. The hash is not cryptographic: a client that forges a collision gets a wrong route, never wrong data,
and cannot aim without the secret.
"""

from __future__ import annotations

import msgspec
from xxhash import xxh3_64_intdigest

TOKEN_BYTES = 4


class Namespace(msgspec.Struct, frozen=True):
    """What keeps equal tokens apart in an engine's cache: the LoRA adapter and the client's salt.

    The model is not part of it: the index knows per endpoint what is there, and a request only goes to endpoints that
    serve its model.
    """

    lora: str = ""
    salt: str = ""


def token_root(secret: bytes, namespace: Namespace, block_tokens: int) -> int:
    """Where chains over token blocks of this size begin."""
    return _root(b"tokens", secret, namespace, block_tokens)


def byte_root(secret: bytes, namespace: Namespace, chunk_bytes: int) -> int:
    """Where chains over chunks of rendered text begin."""
    return _root(b"bytes", secret, namespace, chunk_bytes)


def _root(kind: bytes, secret: bytes, namespace: Namespace, size: int) -> int:
    return xxh3_64_intdigest(msgspec.msgpack.encode((kind, secret, namespace.lora, namespace.salt, size)))


def chain(key: int, data: bytes | memoryview, step_bytes: int) -> list[int]:
    """The keys of all whole steps in `data`, continuing from `key`. Tokens are u32, little-endian."""
    keys: list[int] = []
    view = memoryview(data)
    for start in range(0, len(view) - step_bytes + 1, step_bytes):
        key = xxh3_64_intdigest(view[start : start + step_bytes], key)
        keys.append(key)
    return keys
