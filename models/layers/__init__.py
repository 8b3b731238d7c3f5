"""Layers of a block: linear maps, norms, feed-forward networks, the embedding."""
