"""What keeps equal tokens apart in an engine's cache: adapters, salts, images. Pure; read from events here.

`block_seed` defines how content besides tokens enters a key. Whoever makes the keys of a request with images must use
it too; what is folded on one side only can cost a match, never invent one.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from xxhash import xxh3_64_intdigest

from picker.core.prefix.keys import Namespace
from picker.signals.kv.decode import BlockStored, extra_keys

BlockExtras = list[object]


def block_seed(key: int, extras: Sequence[object]) -> int:
    """The seed for a block with content besides its tokens, instead of `key`, the key of the block before.

    `extras` are in the engine's order; an image is `[identifier, offset in the block]`. The formula is
    `xxh3_64(msgpack(extras), seed=key)`.
    """
    return xxh3_64_intdigest(msgspec.msgpack.encode(extras), key)


class Apart(msgspec.Struct, frozen=True, gc=False):
    """What one event says of its blocks besides tokens. `blocks` is empty when no block has extras of its own."""

    namespace: Namespace
    blocks: Sequence[BlockExtras] = ()


def apart(event: BlockStored) -> Apart:
    """The namespace of the event's chain and the extras of its blocks. Raises EventError for malformed extras.

    vLLM lists the adapter's name in every block and the salt in the first block of the prompt, both as plain strings,
    so a string there that is not the adapter's is the salt. SGLang has a field for it.
    """
    lora = event.lora_name or ("" if event.lora_id is None else str(event.lora_id))
    salt = event.cache_salt or ""
    listed = extra_keys(event.extra_keys)
    if not listed:
        return Apart(Namespace(lora, salt))
    blocks = [_without(block or (), lora) for block in listed]
    if event.parent_block_hash is None and not salt:
        salt = next((item for item in blocks[0] if isinstance(item, str)), "")
        blocks[0] = _without(blocks[0], salt)
    return Apart(Namespace(lora, salt), blocks if any(blocks) else ())


def _without(extras: Sequence[object], name: str) -> BlockExtras:
    """The extras less one of that name: a salt may be spelled like the adapter."""
    rest = list(extras)
    if name in rest:
        rest.remove(name)
    return rest
