"""Where endpoints come from: each source yields what exists, nothing more.

Owns the translation of configuration entries to endpoints and the resolution of host names. Must not route, probe or
import the signals.
"""
