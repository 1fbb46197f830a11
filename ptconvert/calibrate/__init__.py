"""What a conversion computes from a text: which track gets which units, and the tracks' guesses."""
