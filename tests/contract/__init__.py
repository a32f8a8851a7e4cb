"""What every scorer, source or connector must do, run for each one registered."""
