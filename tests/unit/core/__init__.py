"""Tests of the routing core."""
