"""Unit tests of the state that replicas share."""
