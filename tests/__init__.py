"""Tests: `unit` is pure, `contract` holds for all plugins of a kind, `integration` uses real sockets, `sim` is seeded."""
