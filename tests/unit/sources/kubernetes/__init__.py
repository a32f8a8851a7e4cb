"""Tests of the Kubernetes source's parts, without a socket."""
