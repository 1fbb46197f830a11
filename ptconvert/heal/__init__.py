"""Healing: what a conversion cost is recovered by training towards the source model."""
