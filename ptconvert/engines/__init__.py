"""Serving engines that run converted checkpoints."""
