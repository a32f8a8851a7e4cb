"""Secrets: where they come from, and that no text ever shows one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from picker.config import Problem, effective_json, effective_text, load

SECRET = "sk-Zq7very-private"


def outcome(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> list[Problem]:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    result = load(path, environ=environ or {}, flags={})
    assert isinstance(result, list)
    return result


def test_from_environment_file_and_literally(tmp_path: Path) -> None:
    secret_file = tmp_path / "key"
    secret_file.write_text(f"{SECRET}-file\n")
    path = tmp_path / "w.yaml"
    path.write_text(
        f"admin: {{token: '${{MY_TOKEN}}'}}\n"
        f"credentials:\n  a: {{api_key: 'file:{secret_file}'}}\n  b: {{api_key: {SECRET}-literal}}\n"
    )
    result = load(path, environ={"MY_TOKEN": f"{SECRET}-env"}, flags={})
    assert not isinstance(result, list)
    config = result.config
    found = [config.admin.token, config.credentials["a"].api_key, config.credentials["b"].api_key]
    assert [secret.get_secret_value() for secret in found if secret] == [
        f"{SECRET}-{end}" for end in ("env", "file", "literal")
    ]

    texts = [
        repr(result),
        str(config),
        repr(config.credentials),
        config.model_dump_json(),
        json.dumps(config.model_dump(mode="json")),
        effective_text(config, result.origins),
        effective_json(config, result.origins),
    ]
    assert not [text for text in texts if SECRET in text]
    assert "'**********'" in texts[5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("admin: {token: '${NOPE}'}", "1:16: admin.token: environment variable NOPE is not set"),
        ("admin: {token: '${EMPTY}'}", "1:16: admin.token: environment variable EMPTY is empty"),
        ("admin: {token: 'x${NOPE}'}", "1:16: admin.token: must be ${NAME} alone, without text around it"),
        ("admin: {token: ''}", "1:16: admin.token: must not be empty"),
        ("admin: {token: 'file:key'}", "1:16: admin.token: must have an absolute path after file:"),
        (
            "admin: {token: 'file:/no/such/file'}",
            "1:16: admin.token: cannot read /no/such/file: No such file or directory",
        ),
        ('admin: {token: "a\\nb"}', "1:16: admin.token: must be one line of printable ASCII characters"),
        (
            "admin: {token: 5}",
            "1:16: admin.token: must be text: ${NAME}, file:/path or the secret itself in quotes",
        ),
    ],
)
def test_mistakes(text: str, expected: str, tmp_path: Path) -> None:
    (problem,) = outcome(tmp_path, text, {"EMPTY": ""})
    assert str(problem).endswith(f"w.yaml:{expected}")


@pytest.mark.parametrize(
    "text",
    [
        f"admin: {SECRET}",
        f"admin: {{token: [{SECRET}]}}",
        f"admin: {{token: {{x: {SECRET}}}}}",
        f"admin: {{tokn: {SECRET}}}",
        f"admin: {{token: '{SECRET}${{X}}'}}",
        f'admin: {{token: "{SECRET}\\n"}}',
        f"admin: {{token: 'file:{SECRET}'}}",
        f"admin: {{token: *{SECRET}}}",
        f"admin: {{token: !{SECRET} x}}",
        f"admin: {{token: '{SECRET}}}",
        f"admin: {{token: &{SECRET} x, listen: &{SECRET} y}}",
        f"admin: {{token: %{SECRET}}}",
        f"credentials: {SECRET}",
        f"credentials: {{a: {SECRET}}}",
        f"credentials: {{a: {{api_key: [{SECRET}]}}}}",
        f"credentials: {{a: {{api_kee: {SECRET}}}}}",
        f"endpoints: {{static: [{{url: 'http://a:1', credentials: {SECRET}}}]}}",
        f"endpoints: {{static: ['http://user:{SECRET}@a:1']}}",
        f"endpoints: {{static: [{{url: 'http://a:1/?key={SECRET}'}}]}}",
        f"endpoints: {{static: [{{url: 'http://a:1', api_key: {SECRET}}}]}}",
        f"api_key: {SECRET}",
    ],
)
def test_mistakes_never_show_the_value(text: str, tmp_path: Path) -> None:
    found = outcome(tmp_path, text)
    assert found
    for problem in found:
        assert SECRET not in str(problem)
        assert SECRET not in repr(problem)
        assert SECRET not in json.dumps(problem.as_dict())


@pytest.mark.parametrize(
    "variable", ["WAYPOST_ADMIN__TOKEN", "WAYPOST_ADMIN", "WAYPOST_CREDENTIALS", "WAYPOST_CREDENTIALS__A"]
)
def test_variables_never_show_the_value(variable: str) -> None:
    result = load(None, environ={variable: f"{SECRET}\n\n\tü"}, flags={})
    assert isinstance(result, list)
    assert str(result[0]).startswith(f"{variable}: ")
    assert SECRET not in "".join(map(str, result))


def test_long_secret_file_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"x" * (64 * 1024 + 1))
    (problem,) = outcome(tmp_path, f"admin: {{token: 'file:{key}'}}")
    assert problem.message == f"{key} holds more than 64KiB"
    key.write_bytes(b"\n")
    (problem,) = outcome(tmp_path, f"admin: {{token: 'file:{key}'}}")
    assert problem.message == f"{key} is empty"
