"""What models are made of: families, shapes, what guesses add, as data."""
