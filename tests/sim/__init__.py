"""Seeded runs on the simulated clock."""
