"""The admin port: health, readiness, metrics, and why each decision was made. It reads state and changes none."""
