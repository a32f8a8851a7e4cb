"""Simulated inference engines: one physics model behind an HTTP server, and later behind a simulated clock.

This package shares no code with what it tests: it never imports the gateway, the picker's doors or its signal readers.
"""
