"""The YAML document that says how a model is converted."""
