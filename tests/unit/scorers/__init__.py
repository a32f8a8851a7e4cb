"""Tests of the scorers, one file each."""
