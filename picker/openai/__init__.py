"""Inference API bodies in, error bodies out: routes, requirements, in-place edits, errors, usage.

Pure functions on bytes. No I/O, no clock, no asyncio, no knowledge of endpoints or scheduling.
"""
