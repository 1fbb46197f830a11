"""Texts, opened models, how far predictions are apart, and what that takes."""
