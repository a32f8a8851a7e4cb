"""Tests of the HTTP client for model servers."""
