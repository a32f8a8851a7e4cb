"""Tests of picker.signals.kv."""
