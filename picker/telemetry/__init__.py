"""What Waypost tells about itself: every metric is declared in `metrics`, every log line is shaped in `logs`.

Label sets are bounded, prompts and secrets are never values. Nothing here decides anything.
"""
