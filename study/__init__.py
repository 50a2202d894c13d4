"""From logs to a verdict."""
