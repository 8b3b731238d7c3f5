"""Token mixers: what moves information between positions."""
