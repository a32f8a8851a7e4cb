"""Precedence, environment variables, flags and origins."""

from __future__ import annotations

from pathlib import Path

import pytest

from picker.config import Config, Loaded, effective_text, load

NONE: dict[tuple[str, ...] | str, object] = {}


def loaded(
    tmp_path: Path,
    text: str = "",
    environ: dict[str, str] | None = None,
    flags: dict[tuple[str, ...] | str, object] | None = None,
) -> Loaded:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    result = load(path, environ=environ or {}, flags=flags or {})
    assert not isinstance(result, list), [str(problem) for problem in result]
    return result


def refused(environ: dict[str, str], flags: dict[tuple[str, ...] | str, object] | None = None) -> list[str]:
    result = load(None, environ=environ, flags=flags or {}, flag_names={("endpoints", "static"): "--to"})
    assert isinstance(result, list)
    return [str(problem) for problem in result]


def test_nothing_given_is_the_defaults() -> None:
    result = load(None, environ={}, flags={})
    assert not isinstance(result, list)
    assert result.config == Config()
    assert {str(origin) for origin in result.origins.values()} == {"default"}
    assert result.warnings == ()


@pytest.mark.parametrize("text", ["", "# nothing\n", "admin:\nlimits:\n", "---\n", "{}"])
def test_empty_files_and_sections_are_the_defaults(text: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, text).config == Config()


def test_flags_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    text = "listen: 127.0.0.1:1\nadmin: {listen: 127.0.0.1:1}\npolicy: random\n"
    environ = {"WAYPOST_LISTEN": "127.0.0.1:2", "WAYPOST_ADMIN__LISTEN": "127.0.0.1:2"}
    result = loaded(tmp_path, text, environ, {"listen": "127.0.0.1:3", "log.level": None})
    assert str(result.config.listen) == "127.0.0.1:3"
    assert str(result.config.admin.listen) == "127.0.0.1:2"
    assert result.config.policy == "random"
    assert result.config.log.level == "info"
    assert str(result.origins["listen",]) == "flag --listen"
    assert str(result.origins["admin", "listen"]) == "env WAYPOST_ADMIN__LISTEN"
    assert str(result.origins["policy",]) == f"file {tmp_path / 'w.yaml'}:3:1"
    assert str(result.origins["log", "level"]) == "default"


def test_sections_merge_key_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    text = (
        "models: {a: b, c: d}\nendpoints: {static: ['http://a:1', 'http://b:1']}\nlimits: {body: 1MiB, headers: 1KiB}\n"
    )
    environ = {
        "WAYPOST_MODELS": "{c: e}",
        "WAYPOST_ENDPOINTS__STATIC": "['http://c:1']",
        "WAYPOST_LIMITS": "{body: 2MiB}",
    }
    config = loaded(tmp_path, text, environ).config
    assert config.models == {"a": "b", "c": "e"}
    assert [entry.url for entry in config.endpoints.static] == ["http://c:1"]
    assert (config.limits.body, config.limits.headers) == (2 * 2**20, 2**10)


def test_variables_are_text_where_text_is_wanted(tmp_path: Path) -> None:
    environ = {
        "WAYPOST_ADMIN__TOKEN": "12345",
        "WAYPOST_PICKER__GRPC_PORT": "7000",
        "WAYPOST_PICKER__SECURE_SERVING": "false",
        "WAYPOST_LOG__LEVEL": "DEBUG",
        "WAYPOST_DRAIN__TIMEOUT": "",
    }
    result = loaded(tmp_path, "", environ)
    assert result.config.admin.token is not None
    assert result.config.admin.token.get_secret_value() == "12345"
    assert result.config.picker.grpc_port == 7000
    assert result.config.picker.secure_serving is False
    assert result.config.log.level == "debug"
    assert str(result.origins["drain", "timeout"]) == "default"


def test_free_keys_in_variables_match_the_file(tmp_path: Path) -> None:
    text = "credentials: {My-Key: {verify: false}}\n"
    environ = {"WAYPOST_CREDENTIALS__MY_KEY__API_KEY": "s", "WAYPOST_CREDENTIALS__OTHER__VERIFY": "false"}
    config = loaded(tmp_path, text, environ).config
    assert set(config.credentials) == {"My-Key", "other"}
    assert config.credentials["My-Key"].api_key is not None


def test_unknown_variables_warn(tmp_path: Path) -> None:
    environ = {
        "WAYPOST_LISTN": "x",
        "WAYPOST_LOG__LEVEL__X": "x",
        "WAYPOST_CONFIG": "w.yaml",
        "WAYPOST_ADMIN_TOKEN": "secret",
        "OTHER": "x",
    }
    result = loaded(tmp_path, "admin: {token: '${WAYPOST_ADMIN_TOKEN}'}", environ)
    assert result.warnings == (
        "WAYPOST_LISTN: unknown variable, ignored; did you mean WAYPOST_LISTEN?",
        "WAYPOST_LOG__LEVEL__X: unknown variable, ignored; did you mean WAYPOST_LOG__LEVEL?",
    )


def test_problems_name_the_variable_or_the_flag() -> None:
    assert refused(
        {"WAYPOST_LISTEN": "8080", "WAYPOST_GATEWAY__ALLOW_PATHS": "[/v1/a, b]", "WAYPOST_MODELS": "{a"},
        {"endpoints.static": ["http://a:1", "b:1"], ("picker", "grpc_port"): 70000},
    ) == [
        "WAYPOST_MODELS: not valid YAML: expected ',' or '}', but got '<stream end>'",
        'WAYPOST_LISTEN: must be HOST:PORT, such as 127.0.0.1:8080 or "[::1]:8080"; '
        "did you mean 127.0.0.1:8080? (got '8080')",
        "--to: must start with http:// or https://; did you mean http://b:1? (got 'b:1')",
        "WAYPOST_GATEWAY__ALLOW_PATHS: 1: must be a path such as /v1/foo (got 'b')",
        "--grpc-port: must be at most 65535 (got 70000)",
    ]


def test_a_default_that_no_longer_fits_blames_what_was_set() -> None:
    assert refused({"WAYPOST_PICKER__GRPC_PORT": "9003"}) == [
        "WAYPOST_PICKER__GRPC_PORT: picker.grpc_health_port: must differ from picker.grpc_port"
    ]


def test_paths_start_where_they_were_written(tmp_path: Path) -> None:
    text = "endpoints: {file: endpoints.yaml}\ncredentials: {a: {ca: /abs/ca.pem}}\n"
    result = loaded(tmp_path, text, {"WAYPOST_PICKER__CERT_PATH": "certs"})
    assert result.config.endpoints.file == tmp_path / "endpoints.yaml"
    assert result.config.credentials["a"].ca == Path("/abs/ca.pem")
    assert result.config.picker.cert_path == Path.cwd() / "certs"


def test_every_value_has_an_origin_and_a_line(tmp_path: Path) -> None:
    text = (
        "admin:\n  token: s3cret\nendpoints:\n  static:\n  - http://a:1\n  - {url: 'http://b:1', labels: {zone: x}}\n"
    )
    result = loaded(tmp_path, text, {"WAYPOST_POLICY": "random"})
    name = tmp_path / "w.yaml"
    shown = [line.split("  # ") for line in effective_text(result.config, result.origins).splitlines()]
    rows = {row[0].rstrip(): row[1] if len(row) > 1 else None for row in shown}
    assert rows["policy: random"] == "env WAYPOST_POLICY"
    assert rows["  token: '**********'"] == f"file {name}:2:3"
    assert rows["  static:"] == f"file {name}:4:3"
    assert rows["    - {url: 'http://b:1', labels: {zone: x}, role: both, engine: auto}"] is None
    assert rows["  first_byte: 5m"] == "default"
