"""Every kind of mistake in a file, with the exact line a person sees."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from picker.config import EndpointEntry, KnownNames, is_problems, load, load_endpoint_file

KNOWN = KnownNames(
    policies=frozenset({"balanced", "least-loaded", "round-robin", "random"}),
    filters=frozenset({"health", "saturation"}),
    scorers=frozenset({"queue-depth", "kv-usage"}),
    pickers=frozenset({"max-score", "random"}),
)


def problems(text: str, tmp_path: Path, environ: dict[str, str] | None = None) -> list[str]:
    path = tmp_path / "w.yaml"
    path.write_text(text, encoding="utf-8")
    result = load(path, environ=environ or {}, flags={}, known=KNOWN)
    assert isinstance(result, list), "the file was accepted"
    return [str(problem).replace(str(path), "w.yaml") for problem in result]


DURATION = "must be a duration with a unit, such as 50ms, 2s, 5m or 1h"
SHARE = "must be a share such as 25% or a size such as 4GiB"
SIZE = "must be a size with a unit, such as 64KiB, 10MiB or 4GiB"
HOST_PORT = 'must be HOST:PORT, such as 127.0.0.1:8080 or "[::1]:8080"'
MAPPING = "must be a mapping (lines of key: value)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Unknown keys point at the key, suggest, and never show the value.
        ("polcy: x", "1:1: polcy: unknown key; did you mean policy?"),
        ("log:\n  levle: x", "2:3: log.levle: unknown key; did you mean level?"),
        ("drain: {zzz: 1}", "1:9: drain.zzz: unknown key (keys here: delay, timeout)"),
        ("Listen: x", "1:1: Listen: unknown key; did you mean listen?"),
        # Names.
        ("policy: balancd", "1:9: policy: unknown policy; did you mean balanced? (got 'balancd')"),
        (
            "policy: zzz",
            "1:9: policy: unknown policy (there are: balanced, least-loaded, random, round-robin) (got 'zzz')",
        ),
        (
            "policy: min\nprofiles: {mine: {}}",
            "1:9: policy: unknown policy; did you mean mine? (got 'min')",
        ),
        (
            "profiles: {m: {filters: [helth]}}",
            "1:26: profiles.m.filters.0: unknown filter; did you mean health? (got 'helth')",
        ),
        (
            "profiles: {m: {scorers: [{name: queue-dept}]}}",
            "1:33: profiles.m.scorers.0.name: unknown scorer; did you mean queue-depth? (got 'queue-dept')",
        ),
        (
            "profiles: {m: {picker: max}}",
            "1:24: profiles.m.picker: unknown picker (there are: max-score, random) (got 'max')",
        ),
        (
            "profiles: {m: {scorers: [{name: kv-usage, weight: -1}]}}",
            "1:51: profiles.m.scorers.0.weight: must be at least 0 (got -1)",
        ),
        (
            "profiles: {random: {}}",
            "1:12: profiles.random: is the name of a built-in policy; choose another one (got 'random')",
        ),
        (
            "endpoints: {static: [{url: 'http://a:1', engine: vlm}]}",
            "1:50: endpoints.static.0.engine: must be one of auto, vllm, sglang, trtllm, triton, nim, none; "
            "did you mean vllm? (got 'vlm')",
        ),
        # Values.
        ("timeouts: {connect: 2}", f"1:21: timeouts.connect: {DURATION}; did you mean 2s? (got 2)"),
        ("timeouts: {connect: 2 s}", f"1:21: timeouts.connect: {DURATION} (got '2 s')"),
        ("timeouts: {connect: 0s}", "1:21: timeouts.connect: must be longer than 0s (got '0s')"),
        ("timeouts: {total: 1000h}", "1:19: timeouts.total: must be at most 720h (got '1000h')"),
        ("limits: {body: 64}", f"1:16: limits.body: {SIZE}; did you mean 64MiB? (got 64)"),
        ("limits: {body: 65536}", f"1:16: limits.body: {SIZE}; did you mean 64KiB? (got 65536)"),
        ("limits: {body: 10Mb}", f"1:16: limits.body: {SIZE} (got '10Mb')"),
        (
            "limits: {bodies_in_memory: 25}",
            f"1:28: limits.bodies_in_memory: {SHARE}; did you mean 25%? (got 25)",
        ),
        (
            "limits: {bodies_in_memory: 101%}",
            "1:28: limits.bodies_in_memory: must be between 1% and 100% (got '101%')",
        ),
        ("listen: 8080", f"1:9: listen: {HOST_PORT}; did you mean 127.0.0.1:8080? (got 8080)"),
        ("listen: ::1:8080", f"1:9: listen: {HOST_PORT} (got '::1:8080')"),
        ("listen: a:70000", "1:9: listen: must have a port of at most 65535 (got 'a:70000')"),
        ("listen: 300.1.1.1:80", "1:9: listen: must be an IP address or a host name (got '300.1.1.1:80')"),
        ('listen: "[::g]:80"', "1:9: listen: must have an IPv6 address between the brackets (got '[::g]:80')"),
        ("picker: {grpc_port: 70000}", "1:21: picker.grpc_port: must be at most 65535 (got 70000)"),
        ("picker: {grpc_port: true}", "1:21: picker.grpc_port: must be a number (got true)"),
        ("picker: {grpc_port: abc}", "1:21: picker.grpc_port: must be a whole number (got 'abc')"),
        ("picker: {grpc_port: 1.5}", "1:21: picker.grpc_port: must be a whole number (got 1.5)"),
        ("picker: {secure_serving: maybe}", "1:26: picker.secure_serving: must be true or false (got 'maybe')"),
        ("picker: {fallbacks: -1}", "1:21: picker.fallbacks: must be at least 0 (got -1)"),
        ("gateway: {allow_paths: [foo]}", "1:25: gateway.allow_paths.0: must be a path such as /v1/foo (got 'foo')"),
        ("gateway: {allow_paths: /v1/foo}", "1:24: gateway.allow_paths: must be a list (got '/v1/foo')"),
        ("gateway: {max_attempts: 0}", "1:25: gateway.max_attempts: must be at least 1 (got 0)"),
        (
            "log: {level: inf}",
            "1:14: log.level: must be one of debug, info, warning, error; did you mean info? (got 'inf')",
        ),
        ("drain: 30s", f"1:8: drain: {MAPPING} (got '30s')"),
        ("models: [a]", f"1:9: models: {MAPPING} (got a list)"),
        ("models: {a: 7}", "1:13: models.a: must be text: put it in quotes (got 7)"),
        # Endpoints.
        (
            "endpoints: {static: ['a:8000']}",
            "1:22: endpoints.static.0: must start with http:// or https://; did you mean http://a:8000? (got 'a:8000')",
        ),
        (
            "endpoints: {static: ['http://a:8000/v1']}",
            "1:22: endpoints.static.0: must have no path; did you mean http://a:8000? (got 'http://a:8000/v1')",
        ),
        (
            "endpoints: {static: ['http://a:x']}",
            "1:22: endpoints.static.0: must be a URL, such as http://10.0.0.1:8000 (got 'http://a:x')",
        ),
        ("endpoints: {static: [{name: x}]}", "1:22: endpoints.static.0.url: is required"),
        (
            "endpoints: {static: ['http://a:1', 'http://a:1']}",
            "1:36: endpoints.static.1: is the same endpoint as an earlier one; give each a name of its own",
        ),
        (
            "endpoints: {static: [{url: 'http://a:1', model: x, models: [y]}]}",
            "1:42: endpoints.static.0.model: must not be set together with models",
        ),
        (
            "endpoints: {static: [{url: 'http://a:1', labels: {zone: 1}}]}",
            "1:57: endpoints.static.0.labels.zone: must be text: put it in quotes (got 1)",
        ),
        (
            "endpoints: {static: [{url: 'http://a:1', credentials: b}]}\ncredentials: {main: {}}",
            "1:55: endpoints.static.0.credentials: no such entry under credentials: (there: main)",
        ),
        # Keys that do not fit together.
        ("picker: {grpc_port: 9003}", "1:9: picker.grpc_health_port: must differ from picker.grpc_port"),
        ("picker:\n  cert_reload: true", "2:3: picker.cert_reload: needs picker.cert_path"),
        (
            "scrape: {idle_interval: 100ms}",
            "1:10: scrape.idle_interval: must not be shorter than scrape.busy_interval",
        ),
        (
            "health: {breaker_open_max: 1s}",
            "1:10: health.breaker_open_max: must not be shorter than health.breaker_open",
        ),
        ("credentials: {a: {client_cert: /x}}", "1:19: credentials.a.client_cert: needs client_key too"),
        (
            'models: {a: "${X}"}',
            "1:13: models.a: ${NAME} is read for secrets only (admin.token, credentials.*.api_key, "
            "index.redis_url); "
            "set this key with a WAYPOST_... variable instead",
        ),
    ],
)
def test_one_mistake(text: str, expected: str, tmp_path: Path) -> None:
    found = problems(text, tmp_path)
    assert found == [f"w.yaml:{expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b: c", "1:5: not valid YAML: mapping values are not allowed here"),
        ("a: 'x", "1:6: not valid YAML: found unexpected end of stream"),
        (
            "log:\n\tlevel: x",
            "2:1: not valid YAML: found character that cannot start any token; indent with spaces, not tabs",
        ),
        (
            "listen: [::1]:80",
            "1:10: not valid YAML: expected the node content, but found ':'; "
            'an address with brackets needs quotes: "[::1]:8080"',
        ),
        (
            "admin: {token: ${X}}",
            "1:17: not valid YAML: expected ',' or '}', but got '{'; "
            'inside {...} a reference needs quotes: "${NAME}"',
        ),
        ("---\nlog: {}\n---\nlog: {}", "3:1: not valid YAML: a second document starts here"),
        ("a: \x01", "1:4: has a character that YAML does not allow"),
        ("policy: random\nlog: {}\npolicy: balanced", "3:1: policy: duplicate key; it is already on line 1"),
        ("- a", f"1:1: {MAPPING}"),
        ("policy: !!python/object:os.system x", "1:9: policy: YAML tags (words that start with !) are not allowed"),
        ("policy: *x", "1:9: alias without an anchor (text that starts with * needs quotes)"),
        ("log: &x {}\ndrain:\n  <<: *x", "3:3: drain.<<: merge keys (<<) are not supported"),
        ("? [a]\n: b", "1:3: a key must be plain text"),
        ("[" * 5000, "1:33: nested more than 32 deep"),
        (f"a: &a 1\nb: [{', '.join(['*a'] * 101)}]", "2:405: more than 100 aliases"),
        ("a: &x [*x]", "1:4: more than 100000 values or 32 levels, counting aliases in full"),
    ],
)
def test_yaml_mistakes(text: str, expected: str, tmp_path: Path) -> None:
    assert problems(text, tmp_path) == [f"w.yaml:{expected}"]


def test_alias_bomb_is_refused(tmp_path: Path) -> None:
    names = "abcdefgh"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{n}: &{n} [{', '.join([f'*{p}'] * 10)}]" for p, n in itertools.pairwise(names)]
    found = problems("\n".join(lines), tmp_path)
    assert len(found) == 1
    assert found[0].endswith("more than 100000 values or 32 levels, counting aliases in full")


def test_file_trouble(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    result = load(missing, environ={}, flags={})
    assert isinstance(result, list)
    assert str(result[0]) == f"{missing}: cannot read the file: No such file or directory"

    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (2**20 + 1))
    result = load(large, environ={}, flags={})
    assert isinstance(result, list)
    assert str(result[0]) == f"{large}: is larger than 1MiB"

    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"log: {}\npolicy: caf\xe9\n")
    result = load(latin, environ={}, flags={})
    assert isinstance(result, list)
    assert str(result[0]) == f"{latin}:2:12: is not UTF-8 text"


def test_all_at_once_in_reading_order(tmp_path: Path) -> None:
    text = "listn: 127.0.0.1:1\npolicy: balancd\ntimeouts:\n  connect: 2\n"
    text += "endpoints:\n  static: [ftp://a:1]\npolicy: random\n"
    assert problems(text, tmp_path, {"WAYPOST_DRAIN__TIMEOUT": "5"}) == [
        "w.yaml:1:1: listn: unknown key; did you mean listen?",
        "w.yaml:2:9: policy: unknown policy; did you mean balanced? (got 'balancd')",
        f"w.yaml:4:12: timeouts.connect: {DURATION}; did you mean 2s? (got 2)",
        "w.yaml:6:12: endpoints.static.0: must start with http:// or https:// (got 'ftp://a:1')",
        "w.yaml:7:1: policy: duplicate key; it is already on line 2",
        f"WAYPOST_DRAIN__TIMEOUT: {DURATION}; did you mean 5s? (got '5')",
    ]


def test_names_are_not_checked_without_tables(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("policy: anything\nprofiles: {p: {scorers: [made-up]}}")
    assert not isinstance(load(path, environ={}, flags={}), list)


def test_long_values_are_cut(tmp_path: Path) -> None:
    (line,) = problems(f"policy: {'x' * 200}", tmp_path)
    assert line.endswith("(got '" + "x" * 57 + "...')")


def test_endpoint_file(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(
        "endpoints:\n- http://[::1]:8000\n- {url: 'https://b.example', name: b, role: decode, models: [m]}\n"
    )
    entries = load_endpoint_file(path)
    assert not is_problems(entries)
    first, second = entries
    assert isinstance(first, EndpointEntry)
    assert isinstance(second, EndpointEntry)
    assert (first.id, str(first.host_port), first.served_models) == ("[::1]:8000", "[::1]:8000", ())
    assert (second.id, str(second.host_port), second.role, second.served_models) == (
        "b",
        "b.example:443",
        "decode",
        ("m",),
    )


def test_endpoint_file_problems(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text("endpoints:\n- {url: 'http://a:1', rol: x}\n- {url: 'http://b:1', credentials: nope}\n")
    found = load_endpoint_file(path, credentials=frozenset({"main"}))
    assert is_problems(found)
    assert [str(p).replace(str(path), "e.yaml") for p in found] == [
        "e.yaml:2:23: endpoints.0.rol: unknown key; did you mean role?",
        "e.yaml:3:36: endpoints.1.credentials: no such entry under credentials: (there: main)",
    ]
    path.write_text("")
    assert load_endpoint_file(path) == []
    path.write_text("- http://a:1")
    found = load_endpoint_file(path)
    assert is_problems(found)
    assert str(found[0]) == f"{path}:1:1: {MAPPING}"
