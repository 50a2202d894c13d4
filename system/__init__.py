"""What every program needs of the operating system."""
