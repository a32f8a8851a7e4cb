"""Pure tests, one directory per room."""
