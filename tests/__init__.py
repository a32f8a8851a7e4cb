"""Tests: `unit` is pure, `contract` holds for every plugin of a kind, `integration` uses real sockets, `sim` a seed."""
