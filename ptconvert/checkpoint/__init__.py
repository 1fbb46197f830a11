"""Checkpoints on disk: reading lazily, writing streamed and atomically, and the hub."""
