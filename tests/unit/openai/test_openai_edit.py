"""In-place edits: against json.loads semantics, and byte for byte where nothing was edited."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.openai.edit import (
    EditError,
    members,
    remove_members,
    remove_members_within,
    set_raw,
    set_string,
)

KEYS = ("model", "a", "b", "nvext", "é\n", 'q"uote', "back\\slash", "")
SPACES = st.text(alphabet=" \t\n\r", max_size=3)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**80), max_value=2**80),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    st.sampled_from(['","model":"x"', "{", "}]", '\\"', "a\\", '"model"']),
)


def keys() -> st.SearchStrategy[str]:
    return st.one_of(st.sampled_from(KEYS), TEXT)


def escape_all(text: str) -> str:
    """A JSON string in which every character is a \\u escape."""
    units = text.encode("utf-16-be")
    return '"' + "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)) + '"'


@st.composite
def json_text(draw: st.DrawFn, depth: int = 3) -> str:
    """Random JSON with random white space; objects may repeat keys."""
    shape = draw(st.sampled_from(("scalar", "object", "array"))) if depth else "scalar"
    if shape == "scalar":
        return json.dumps(draw(SCALARS), ensure_ascii=draw(st.booleans()))
    if shape == "object":
        return draw(object_text(depth - 1))
    parts = draw(st.lists(json_text(depth - 1), max_size=4))
    return "[" + draw(SPACES) + ",".join(draw(SPACES) + part + draw(SPACES) for part in parts) + "]"


@st.composite
def object_text(draw: st.DrawFn, depth: int = 3) -> str:
    parts = []
    for key in draw(st.lists(keys(), max_size=5)):
        quoted = escape_all(key) if draw(st.booleans()) else json.dumps(key, ensure_ascii=draw(st.booleans()))
        gaps = [draw(SPACES) for _ in range(4)]
        parts.append(gaps[0] + quoted + gaps[1] + ":" + gaps[2] + draw(json_text(depth)) + gaps[3])
    return "{" + (",".join(parts) if parts else draw(SPACES)) + "}"


@st.composite
def document(draw: st.DrawFn) -> bytes:
    return (draw(SPACES) + draw(object_text()) + draw(SPACES)).encode()


class Pairs(list):  # type: ignore[type-arg]
    """An object as its list of members, so that duplicates and order can be compared."""


def load_pairs(body: bytes) -> Pairs:
    loaded = json.loads(body, object_pairs_hook=Pairs)
    assert isinstance(loaded, Pairs)
    return loaded


@given(document())
def test_members_are_the_members_of_json(body: bytes) -> None:
    expected = load_pairs(body)
    found = members(body)
    assert [member.key for member in found] == [key for key, _ in expected]
    for member, (_, value) in zip(found, expected, strict=True):
        text = body[member.value_start : member.value_end]
        assert json.loads(text, object_pairs_hook=Pairs) == value
        assert text == text.strip()
        assert body[member.key_start : member.key_start + 1] == b'"'


@given(document(), st.sampled_from(KEYS), TEXT)
def test_set_string_changes_all_occurrences_and_nothing_else(body: bytes, key: str, value: str) -> None:
    edited = set_string(body, key, value)
    expected = Pairs((k, value if k == key else v) for k, v in load_pairs(body))
    assert load_pairs(edited) == expected
    if all(k != key for k, _ in expected):
        assert edited == body


@given(document(), st.sampled_from(KEYS), TEXT)
def test_set_string_inserts_when_asked(body: bytes, key: str, value: str) -> None:
    before, after = load_pairs(body), load_pairs(set_string(body, key, value, insert=True))
    if any(k == key for k, _ in before):
        assert after == Pairs((k, value if k == key else v) for k, v in before)
    else:
        assert after == Pairs([(key, value), *before])


@given(document(), st.sets(st.sampled_from(KEYS)))
def test_remove_members_keeps_the_others_in_order(body: bytes, removed: set[str]) -> None:
    edited = remove_members(body, removed)
    before = load_pairs(body)
    assert load_pairs(edited) == Pairs((k, v) for k, v in before if k not in removed)
    if all(k not in removed for k, _ in before):
        assert edited is body
    assert remove_members(edited, removed) == edited


@given(document(), st.sampled_from(KEYS), st.sets(st.sampled_from(KEYS), min_size=1))
def test_remove_within_edits_only_the_inner_object(body: bytes, parent: str, removed: set[str]) -> None:
    def inner(key: str, value: object) -> object:
        if key == parent and isinstance(value, Pairs):
            return Pairs((k, v) for k, v in value if k not in removed)
        return value

    edited = remove_members_within(body, parent, removed)
    assert load_pairs(edited) == Pairs((k, inner(k, v)) for k, v in load_pairs(body))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_value_error_or_a_result(body: bytes) -> None:
    with contextlib.suppress(EditError):
        assert len(remove_members(body, ("a",))) <= len(body)


@given(document(), st.data())
def test_cut_bodies_never_hang_or_crash(body: bytes, data: st.DataObject) -> None:
    cut = body[: data.draw(st.integers(0, len(body)))]
    try:
        found = members(cut)
    except EditError:
        return
    assert len(found) == len(load_pairs(cut))


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ({"a"}, b'{ "b" : 2 , "c" : 3 }'),
        ({"b"}, b'{ "a" : 1 , "c" : 3 }'),
        ({"c"}, b'{ "a" : 1 , "b" : 2 }'),
        ({"a", "b"}, b'{ "c" : 3 }'),
        ({"b", "c"}, b'{ "a" : 1 }'),
        ({"a", "c"}, b'{ "b" : 2 }'),
        ({"a", "b", "c"}, b"{  }"),
        ({"d"}, b'{ "a" : 1 , "b" : 2 , "c" : 3 }'),
    ],
)
def test_commas_in_every_position(removed: set[str], expected: bytes) -> None:
    assert remove_members(b'{ "a" : 1 , "b" : 2 , "c" : 3 }', removed) == expected


def test_what_is_not_edited_survives_byte_for_byte() -> None:
    body = b'{"z":12345678901234567890123, "y":1.50e+3,\t"model" : "a\\u0062" ,"m":{"model":"ab"},"s":"\\/"}\n'
    expected = b'{"z":12345678901234567890123, "y":1.50e+3,\t"model" : "new" ,"m":{"model":"ab"},"s":"\\/"}\n'
    assert set_string(body, "model", "new") == expected


def test_escaped_and_repeated_keys_are_all_found() -> None:
    body = b'{"\\u006dodel":"a","model":"b","mod\\u0065l":"c","x":"model"}'
    assert set_string(body, "model", "n") == b'{"\\u006dodel":"n","model":"n","mod\\u0065l":"n","x":"model"}'
    assert remove_members(body, ("model",)) == b'{"x":"model"}'


def test_a_repeated_key_cannot_hide_members_from_the_walk() -> None:
    # The last value of "a" is as long as everything up to the second "b".
    body = b'{"a":1,"x":{"k":[0,"b",2]},"b":{"secret":1},"a":"\\",\\"x\\":0","b":3}'
    assert [member.key for member in members(body)] == ["a", "x", "b", "a", "b"]
    assert json.loads(remove_members(body, ("b",))) == {"a": '","x":0', "x": {"k": [0, "b", 2]}}


def test_invalid_utf8_and_surrogate_keys_do_not_stop_an_edit() -> None:
    assert set_string(b'{"\xff":1,"model":"a"}', "model", "b") == b'{"\xff":1,"model":"b"}'
    assert set_string(b'{"\\ud800":1,"model":"a"}', "model", "b") == b'{"\\ud800":1,"model":"b"}'


def test_values_are_escaped_and_invalid_ones_refused() -> None:
    assert json.loads(set_string(b'{"model":"a"}', "model", 'q"\\\n☃'))["model"] == 'q"\\\n☃'
    with pytest.raises(EditError):
        set_string(b'{"model":"a"}', "model", "\ud800")


def test_set_raw_takes_any_json() -> None:
    assert set_raw(b'{"max_tokens":99,"x":1}', "max_tokens", b"1") == b'{"max_tokens":1,"x":1}'
    assert set_raw(b"{ }", "max_tokens", b"1", insert=True) == b'{ "max_tokens":1}'


def test_remove_within_a_path_of_two() -> None:
    body = b'{"p":{"extra":{"kv":{"h":1},"k":2},"kv":0},"extra":{"kv":1}}'
    assert remove_members_within(body, ("p", "extra"), ("kv",)) == b'{"p":{"extra":{"k":2},"kv":0},"extra":{"kv":1}}'
    assert remove_members_within(b'{"p":[1]}', ("p", "extra"), ("kv",)) == b'{"p":[1]}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a"',
        b'{"a":',
        b'{"a":1',
        b'{"a":1,}',
        b'{"a":1,"a":1,}',
        b'{"a":1,"a":[1}',
        b'{"a":1,"a":[1]]}',
        b'{"a":1,"a":"x}',
        b'{"a":1,"a":1} x',
        b"{} x",
        b'{"a":1,"a":}',
    ],
)
def test_what_is_not_an_object_is_an_edit_error(body: bytes) -> None:
    with pytest.raises(EditError) as caught:
        members(body)
    assert isinstance(caught.value, ValueError)


HOSTILE = {
    "deep": b'{"a":1,"a":' + b"[" * 1_000_000,
    "deep balanced": b'{"a":1,"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "wide": b'{"a":1,"a":[' + b"[]," * 600_000 + b"[]]}",
    "escapes": b'{"a":1,"a":"' + b'\\"' * 1_000_000,
    "backslashes": b'{"a":1,"a":"' + b"\\" * 2_000_001 + b'"}',
    "quotes": b'{"a":1,"a":' + b'"' * 2_000_000,
    "spaces": b'{"a":1,"a":1' + b" " * 2_000_000,
    "many members": b'{"a":1' + b',"a":1' * 60_000 + b"}",
    "many distinct": b"{" + b",".join(b'"k%d":1' % i for i in range(150_000)) + b"}",
    "one string": json.dumps({"a": "x" * 2_000_000, "model": "m"}).encode(),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_bodies_take_linear_time(name: str) -> None:
    begin = time.perf_counter()
    with contextlib.suppress(EditError):
        set_string(HOSTILE[name], "model", "n")
    # Quadratic behaviour on these would take minutes; 0.2 s is what a slow machine needs for the slowest.
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize("name", ["many members", "many distinct"])
def test_absurdly_many_members_are_refused(name: str) -> None:
    with pytest.raises(EditError, match="too many members"):
        members(HOSTILE[name])


def test_duplicate_keys_with_absurd_nesting_are_refused() -> None:
    with pytest.raises(EditError, match="deep or wide"):
        members(HOSTILE["wide"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400))
def test_nesting_within_the_limit_is_edited(depth: int) -> None:
    body = b'{"x":' + b'{"a":[' * depth + b"]}" * depth + b',"model":"m"}'
    assert set_string(body, "model", "n") == body.replace(b'"m"', b'"n"')
