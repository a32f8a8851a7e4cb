"""The wire: a minimal, hand-written definition of Envoy's ext_proc v3 messages and the path of its one method.

`ext_proc_pb2` is generated from `ext_proc.proto` by `make protos`; `make lint` fails when the two differ. No logic in
here.
"""

from __future__ import annotations

from typing import Final

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
"""Name under which Envoy calls the service and health-checks it."""

PROCESS: Final = "Process"
"""The one method: a stream of ProcessingRequest in, a stream of ProcessingResponse out."""

PROCESS_METHOD: Final = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
"""The method's HTTP/2 path."""
