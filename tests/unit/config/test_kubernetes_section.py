"""The `kubernetes:` section: what it takes, and what it says about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from picker.config import Loaded, Problem, load


def loaded(tmp_path: Path, text: str) -> Loaded | list[Problem]:
    file = tmp_path / "waypost.yaml"
    file.write_text(text)
    return load(file, environ={}, flags={})


def messages(result: Loaded | list[Problem]) -> list[str]:
    assert isinstance(result, list), result
    return [str(problem).partition("waypost.yaml:")[2] for problem in result]


def test_a_pool_by_name_and_one_with_settings(tmp_path: Path) -> None:
    result = loaded(
        tmp_path,
        """
        credentials: {main: {verify: false}}
        kubernetes:
          pools:
            - default/llama
            - {name: qwen, scheme: https, credentials: main, path_prefix: /openai, metrics_port: 9400, workers: never}
            - {name: plain, selector: "app=vllm", target_ports: [8000, 8001]}
          role_labels: [{label: example.com/stage, values: {first: prefill, router: ignore}}]
        """,
    )
    assert isinstance(result, Loaded), result
    first, second, third = result.config.kubernetes.pools
    assert (first.name, first.group, first.scheme, first.path_prefix) == (
        "default/llama",
        "inference.networking.k8s.io",
        "http",
        None,
    )
    assert (second.credentials, second.path_prefix, second.metrics_port, second.workers) == (
        "main",
        "/openai",
        9400,
        "never",
    )
    assert (third.selector, third.target_ports) == ("app=vllm", (8000, 8001))
    assert result.config.kubernetes.role_labels[0].values == {"first": "prefill", "router": "ignore"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("Bad/Name", "must be NAME or NAMESPACE/NAME"),
        ("a/b/c", "must be NAME or NAMESPACE/NAME"),
        ("{name: p, group: example.com}", "must be one of inference.networking.k8s.io"),
        ("{name: p, selector: 'a in b', target_ports: [1]}", "not a label selector"),
        ("{name: p, selector: a=b}", "needs target_ports too"),
        ("{name: p, target_ports: [8000]}", "only with selector"),
        ("{name: p, selector: a=b, target_ports: [8000, 8000]}", "names a port twice"),
        ("{name: p, selector: a=b, target_ports: [0]}", "1"),
        ("{name: p, credentials: nobody}", "no such entry under credentials"),
        ("{name: p, path_prefix: openai}", "must be a path such as /openai"),
        ("{name: p, path_prefix: /openai/}", "must be a path such as /openai"),
        ("{name: p, workers: some}", "workers"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, entry: str, said: str) -> None:
    found = messages(loaded(tmp_path, f"kubernetes:\n  pools:\n    - {entry}\n"))
    assert len(found) == 1, found
    assert found[0].startswith("3:")
    assert said in found[0]


def test_a_pool_named_twice(tmp_path: Path) -> None:
    found = messages(loaded(tmp_path, "kubernetes:\n  pools: [a/b, a/b]\n"))
    assert len(found) == 1
    assert "a/b is there twice" in found[0]


def test_namespaces_and_services_are_checked(tmp_path: Path) -> None:
    found = messages(
        loaded(
            tmp_path,
            "kubernetes:\n  namespace: Bad\nendpoints:\n  dns: ['10.0.0.1:80', 'vllm', 'vllm:0', 'vllm.ns.svc:8000']\n",
        )
    )
    assert len(found) == 4, found
    assert "name of a Kubernetes namespace" in found[0]
    assert all("HOST:PORT" in text or "NAME:PORT" in text for text in found[1:])
