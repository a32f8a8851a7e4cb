"""The brain of Waypost and its ext-proc door; see ARCHITECTURE.md for the rooms and their import rules."""
