"""Form fields of audio uploads."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.openai.edit import EditError
from picker.openai.multipart import MAX_PARTS, parse_form
from picker.openai.parse import BadRequest, ParsedBody, parse_body
from picker.openai.rewrite import rewrite_model

PATH = "/v1/audio/transcriptions"


def form(fields: dict[str, str], audio: bytes = b"RIFF" * 1_000) -> tuple[bytes, str]:
    """A form as a real client encodes it."""
    request = httpx.Request("POST", "http://x", data=fields, files={"file": ("a.wav", audio, "audio/wav")})
    return request.read(), request.headers["content-type"]


def test_model_and_stream_come_from_the_form() -> None:
    body, content_type = form({"model": "whisper-é", "stream": "true", "language": "en"})
    got = parse_body(PATH, body, content_type, require_model=True)
    assert isinstance(got, ParsedBody)
    assert (got.model, got.stream, got.prompt_bytes, got.is_json) == ("whisper-é", True, 4_000, False)
    assert 0 < got.prompt_tokens_estimate < 100


def test_the_model_is_rewritten_in_place() -> None:
    body, content_type = form({"model": "alias", "prompt": "alias"})
    got = parse_body(PATH, body, content_type)
    assert isinstance(got, ParsedBody)
    assert rewrite_model(body, got, "target") == body.replace(b"alias", b"target", 1)
    with pytest.raises(EditError):
        rewrite_model(body, got, "a\r\n--b")
    with pytest.raises(EditError):
        rewrite_model(body, ParsedBody(kind=got.kind), "target")


def test_json_bodies_gain_or_change_the_model() -> None:
    for body, expected in ((b'{"model":"a","prompt":"x"}', b'{"model":"b","prompt":"x"}'), (b"{}", b'{"model":"b"}')):
        got = parse_body("/v1/completions", body, None, strict=False)
        assert isinstance(got, ParsedBody)
        assert rewrite_model(body, got, "b") == expected


def test_missing_model_and_wrong_content_types() -> None:
    body, content_type = form({})
    missing = parse_body(PATH, body, content_type, require_model=True)
    assert isinstance(missing, BadRequest)
    assert missing.param == "model"
    assert isinstance(parse_body(PATH, body, content_type), ParsedBody)
    assert isinstance(parse_body(PATH, b'{"model":"m"}', "application/json"), BadRequest)
    assert isinstance(parse_body(PATH, body, "multipart/form-data"), BadRequest)
    assert isinstance(parse_body(PATH, body, "multipart/form-data; boundary=other"), BadRequest)
    assert isinstance(parse_body("/unknown", body, "multipart/form-data; boundary=other"), ParsedBody)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\n",
        b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nx',
        b'--b\r\ncontent-disposition: form-data; name="model"\r\nno end of headers',
        b'--b\r\ncontent-disposition: form-data; name="n"\r\n\r\nx\r\n' * (MAX_PARTS + 1) + b"--b--",
    ],
)
def test_broken_forms_are_refused(body: bytes) -> None:
    assert parse_form(body, "multipart/form-data; boundary=b") is None


def test_forms_with_a_preamble_odd_headers_and_repeated_fields() -> None:
    body = (
        b"preamble\r\n--b x\r\nX: y\r\nContent-Disposition: form-data;name=model\r\n\r\none\r\n"
        b"--b x\r\n\r\n\r\n--b x\r\n"
        b'CONTENT-DISPOSITION: form-data; filename="model"; name="f"\r\n\r\n12345\r\n--b x\r\n'
        b'content-disposition: form-data; name="model"\r\n\r\ntwo\r\n--b x--\r\n'
    )
    got = parse_form(body, 'Multipart/Form-Data; charset=x; Boundary="b x"')
    assert got is not None
    assert (got.model, got.file_bytes) == ("two", 5)
    assert [body[start:end] for start, end in got.model_spans] == [b"one", b"two"]


@given(st.binary(max_size=200), st.text(max_size=30))
def test_never_raises(body: bytes, boundary: str) -> None:
    for text in (body, b"--b\r\n" + body + b"\r\n--b--"):
        result = parse_body(PATH, text, "multipart/form-data; boundary=" + boundary)
        assert isinstance(result, ParsedBody | BadRequest)
        assert isinstance(parse_body(PATH, text, "multipart/form-data; boundary=b"), ParsedBody | BadRequest)
