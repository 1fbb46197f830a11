"""The model: config classes, the executor, and the transformers classes."""
