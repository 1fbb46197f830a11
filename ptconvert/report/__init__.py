"""What terminals and pages show."""
