"""What every test shares: how hypothesis behaves on a busy machine. Fixtures of a room live beside its tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Two shared cores: wall-clock deadlines of single examples say nothing about the code.
settings.register_profile("waypost", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("waypost")
