"""Merging models: on their weights, by every method that mergekit's YAML can say, and by averaging their logits."""
