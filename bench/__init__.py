"""Benchmarks: what a request costs, measured against doing without. Not shipped."""
