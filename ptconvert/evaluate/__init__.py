"""What a conversion cost in quality: lm-eval tasks and divergence, against the source model."""
