"""In-place byte edits of the members of one JSON object.

Everything not edited survives byte for byte: big integers, key order, white space, escapes, duplicate keys. It never
builds the document. Spans come from a lazy decode at C speed; a regex scanner covers what that cannot describe
(duplicate keys). Any failure is an `EditError`; time is linear and there is no recursion on input.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import msgspec

# Nobody's request has more; a hostile one could hold the event loop for seconds.
MAX_MEMBERS = 4_096
MAX_SCANNED_BRACKETS = 65_536

_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_OPEN_RE = re.compile(_SPACE + rb"\{" + _SPACE)
_KEY_RE = re.compile(rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE, re.DOTALL)
_MEMBER_RE = re.compile(_SPACE + rb"," + _SPACE + rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE, re.DOTALL)
_END_RE = re.compile(_SPACE + rb"\}" + _SPACE + rb"\Z")
_NEXT_RE = re.compile(_SPACE + rb"([,}])" + _SPACE)
_STRING_RE = re.compile(_STRING, re.DOTALL)
_SCALAR_RE = re.compile(rb'[^ \t\n\r,{}\[\]":]++')
_PLAIN_RE = re.compile(rb'[^"{}\[\]]*+(?:' + _STRING + rb'[^"{}\[\]]*+)*+', re.DOTALL)
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])

_OPENERS = b"{["
_CLOSERS = b"}]"
_QUOTE = ord('"')
_CLOSE_OBJECT = ord("}")


class EditError(ValueError):
    """The bytes are not one JSON object that can be edited."""


class Member(msgspec.Struct, frozen=True, gc=False):
    """One occurrence of a member: decoded key, and byte offsets of the key's quote and of the value."""

    key: str
    key_start: int
    value_start: int
    value_end: int


def members(body: bytes) -> list[Member]:
    """Top-level members in document order, duplicates included. Raises EditError, also over `MAX_MEMBERS`."""
    try:
        raws = _MEMBERS.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _scan(body)
    if len(raws) > MAX_MEMBERS:
        raise EditError("the object has too many members to edit")
    found = _walk(body, raws)
    return _scan(body) if found is None else found


def set_raw(body: bytes, key: str, raw: bytes, *, insert: bool = False) -> bytes:
    """Replace the value of every top-level occurrence of `key` by the JSON text `raw`.

    A body without the key comes back unchanged, or with the member put first when `insert` is set. Raises EditError.
    """
    found = members(body)
    spans = [(m.value_start, m.value_end) for m in found if m.key == key]
    if spans:
        return replace_spans(body, spans, raw)
    if not insert:
        return body
    opened = _OPEN_RE.match(body)
    if opened is None:
        raise EditError("the body is not a JSON object")
    start = opened.end()
    return b"".join((body[:start], encode_string(key), b":", raw, b"," if found else b"", body[start:]))


def set_string(body: bytes, key: str, value: str, *, insert: bool = False) -> bytes:
    """`set_raw` with a string value, escaped as JSON. Raises EditError, also for a lone surrogate in `value`."""
    return set_raw(body, key, encode_string(value), insert=insert)


def remove_members(body: bytes, keys: Collection[str]) -> bytes:
    """Remove every top-level occurrence of `keys` with the commas that belong to them; `body` itself when none is."""
    return _cut(body, members(body), keys)


def remove_members_within(body: bytes, path: str | Sequence[str], keys: Collection[str]) -> bytes:
    """`remove_members` inside the object at `path` (one key, or keys from the top level down).

    Every occurrence of the path is edited; members on the way that are not objects stay as they are.
    """
    steps = (path,) if isinstance(path, str) else tuple(path)
    if not steps:
        return remove_members(body, keys)
    pieces: list[bytes] = []
    done = 0
    for member in members(body):
        if member.key != steps[0] or body[member.value_start] != _OPENERS[0]:
            continue
        inner = body[member.value_start : member.value_end]
        edited = remove_members_within(inner, steps[1:], keys)
        if edited is not inner:
            pieces += (body[done : member.value_start], edited)
            done = member.value_end
    if not pieces:
        return body
    return b"".join((*pieces, body[done:]))


def replace_spans(body: bytes, spans: Iterable[tuple[int, int]], new: bytes) -> bytes:
    """Replace byte ranges (ascending, disjoint) by `new`."""
    view = memoryview(body)
    pieces: list[bytes | memoryview] = []
    done = 0
    for start, end in spans:
        pieces += (view[done:start], new)
        done = end
    pieces.append(view[done:])
    return b"".join(pieces)


def encode_string(value: str) -> bytes:
    """`value` as a JSON string. Raises EditError when it is not valid Unicode."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise EditError("the new value is not valid Unicode") from error


def _cut(body: bytes, found: list[Member], keys: Collection[str]) -> bytes:
    kept = [i for i, member in enumerate(found) if member.key not in keys]
    if len(kept) == len(found):
        return body
    if not kept:
        return body[: found[0].key_start] + body[found[-1].value_end :]
    view = memoryview(body)
    pieces = [view[: found[0].key_start]]
    for i in kept[:-1]:
        # A kept member carries the comma after it; the last one kept must not, its followers are gone.
        pieces.append(view[found[i].key_start : found[i + 1].key_start])
    final = found[kept[-1]]
    pieces.append(view[final.key_start : final.value_end])
    pieces.append(view[found[-1].value_end :])
    return b"".join(pieces)


def _walk(body: bytes, raws: dict[str, msgspec.Raw]) -> list[Member] | None:
    """Spans by laying the decoded values over the text; None when they do not fit (a key occurs twice).

    Each value is compared with the text. Strings, arrays and objects are prefix-free and a number must be followed by
    a separator, so the walk cannot leave the top level; when as many members as distinct keys reach the closing brace,
    no key occurs twice and the decoded keys are in document order.
    """
    opened = _OPEN_RE.match(body)
    if opened is None:
        return None
    end = opened.end()
    match = _KEY_RE.match(body, end)
    found: list[Member] = []
    for key, raw in raws.items():
        if match is None:
            return None
        start = match.end()
        if not body.startswith(memoryview(raw), start):
            return None
        end = start + len(raw)
        found.append(Member(key, match.start(1), start, end))
        match = _MEMBER_RE.match(body, end)
    return found if match is None and _END_RE.match(body, end) else None


def _scan(body: bytes) -> list[Member]:
    opened = _OPEN_RE.match(body)
    if opened is None:
        raise EditError("the body is not a JSON object")
    pos = opened.end()
    if body[pos : pos + 1] == b"}":
        if body[pos + 1 :].strip(b" \t\n\r"):
            raise EditError("there is text after the JSON object")
        return []
    found: list[Member] = []
    budget = MAX_SCANNED_BRACKETS
    while True:
        key = _KEY_RE.match(body, pos)
        if key is None:
            raise EditError(f"no member at byte {pos}")
        if len(found) >= MAX_MEMBERS:
            raise EditError("the object has too many members to edit")
        end, budget = _value_end(body, key.end(), budget)
        found.append(Member(_key_text(key.group(1)), pos, key.end(), end))
        after = _NEXT_RE.match(body, end)
        if after is None:
            raise EditError(f"no comma or brace at byte {end}")
        pos = after.end()
        if body[after.start(1)] == _CLOSE_OBJECT:
            break
    if pos != len(body):
        raise EditError("there is text after the JSON object")
    return found


def _value_end(body: bytes, start: int, budget: int) -> tuple[int, int]:
    """End of the value at `start`, and what is left of the bracket budget (so that hostile nesting stays cheap)."""
    first = body[start] if start < len(body) else 0
    if first not in _OPENERS:
        simple = (_STRING_RE if first == _QUOTE else _SCALAR_RE).match(body, start)
        if simple is None:
            raise EditError(f"no value at byte {start}")
        return simple.end(), budget
    closers = bytearray((_CLOSERS[_OPENERS.index(first)],))
    pos = start + 1
    while closers:
        budget -= 1
        if budget < 0:
            raise EditError("duplicate keys in a body this deep or wide cannot be edited")
        plain = _PLAIN_RE.match(body, pos)
        pos = plain.end() if plain is not None else pos
        bracket = body[pos] if pos < len(body) else 0
        if bracket in _OPENERS:
            closers.append(_CLOSERS[_OPENERS.index(bracket)])
        elif closers.pop() != bracket:
            raise EditError(f"unbalanced brackets at byte {pos}")
        pos += 1
    return pos, budget


def _key_text(quoted: bytes) -> str:
    """The key without quotes, unescaped; what is not valid JSON text gets a key that equals no name we look for."""
    if b"\\" not in quoted:
        return quoted[1:-1].decode("utf-8", "surrogateescape")
    try:
        return msgspec.json.decode(quoted, type=str)
    except (msgspec.MsgspecError, ValueError):
        return quoted.decode("latin-1")
