"""Where page bytes live."""
