"""Short ways to a view and what it says, for the tests beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from picker.config import KubernetesSection, PoolEntry
from picker.core.updates import EndpointUpdate, Remove, Upsert
from picker.core.values import Endpoint
from picker.sources.kubernetes.objects import Listed, Node, Pod, PoolV1
from picker.sources.kubernetes.pools import PoolSpec, read_pool
from picker.sources.kubernetes.view import PoolView
from tests.fakes.kube_pods import pool_v1, read

POOL = "default/pool"


def spec(**fields: Any) -> PoolSpec:
    """The spec of `app: vllm` on 8000, unless told otherwise."""
    found = read_pool(read(pool_v1(**fields), PoolV1))
    assert isinstance(found, PoolSpec)
    return found


def labelled(**labels: str) -> dict[str, str]:
    """Labels of a pod that the usual pool selects."""
    return {"app": "vllm", **labels}


def new_view(*, entry: Mapping[str, Any] | None = None, section: Mapping[str, Any] | None = None) -> PoolView:
    """A view that has heard nothing yet."""
    return PoolView(POOL, PoolEntry(name=POOL, **(entry or {})), KubernetesSection(**(section or {})))


def view_of(
    *pods: Mapping[str, Any],
    nodes: tuple[Mapping[str, Any], ...] = (),
    pool: PoolSpec | None = None,
    entry: Mapping[str, Any] | None = None,
    section: Mapping[str, Any] | None = None,
) -> PoolView:
    """A view that was told of everything at once."""
    view = new_view(entry=entry, section=section)
    view.set_spec(pool or spec())
    view.nodes(Listed(tuple(read(each, Node) for each in nodes)))
    view.pods(Listed(tuple(read(each, Pod) for each in pods)))
    return view


def endpoints_of(*pods: Mapping[str, Any], **fields: Any) -> dict[str, Endpoint]:
    """The endpoints of these pods, by id without the namespace."""
    return {endpoint.id.partition("/")[2]: endpoint for endpoint in view_of(*pods, **fields).endpoints}


def only(pod: Mapping[str, Any], **fields: Any) -> Endpoint:
    """The one endpoint of one pod."""
    (endpoint,) = endpoints_of(pod, **fields).values()
    return endpoint


def said(updates: list[EndpointUpdate]) -> list[str]:
    """Updates in short: `+id` and `-id`, all of this pool."""
    found = []
    for update in updates:
        assert isinstance(update, Upsert | Remove)
        assert update.source == POOL
        found.append(f"+{update.endpoint.id}" if isinstance(update, Upsert) else f"-{update.endpoint_id}")
    return found
