"""The gRPC health service: Check under the names that proxies, Kubernetes and older pickers ask for.

It knows nothing of the picker: two callables say what to answer.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2

import protos

LIVENESS = "liveness"
READY_NAMES = frozenset(("", "readiness", "inference-extension", protos.SERVICE))
_SERVICE = "grpc.health.v1.Health"


class HealthService:
    """Answers `liveness` with `alive` and the other names with `ready`; an unknown name gets NOT_FOUND.

    Watch is not implemented, as in the reference; proxies and probes use Check.
    """

    def __init__(self, *, alive: Callable[[], bool], ready: Callable[[], bool]) -> None:
        self._alive = alive
        self._ready = ready

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The Check method."""
        if request.service == LIVENESS:
            serving = self._alive()
        elif request.service in READY_NAMES:
            serving = self._ready()
        else:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service[:100]!r}")
        kinds = health_pb2.HealthCheckResponse
        return kinds(status=kinds.SERVING if serving else kinds.NOT_SERVING)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service for a gRPC server."""
        check = grpc.unary_unary_rpc_method_handler(
            self.check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(_SERVICE, {"Check": check})
