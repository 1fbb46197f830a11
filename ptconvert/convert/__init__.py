"""Planning and executing a rewrite of a checkpoint."""
