"""Tests of the HTTP door's parts that need no socket."""
