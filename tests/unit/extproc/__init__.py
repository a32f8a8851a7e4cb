"""Tests of the room `extproc`."""
