"""Endpoints from a Kubernetes cluster: InferencePools, or label selectors, and the pods they select.

`api` talks to the API server, `reflector` keeps a mirror of one kind of object, `view` turns pools, pods and nodes into
endpoints (pure), `source` wires them. Nothing here probes a pod or chooses one.
"""
