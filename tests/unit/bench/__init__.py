"""Tests of the measuring tools: a benchmark is worth what its instruments are."""
