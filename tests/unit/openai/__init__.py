"""Tests of the room `openai`."""
