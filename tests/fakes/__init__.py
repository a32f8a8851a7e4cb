"""Stand-ins for programs that tests cannot have."""
