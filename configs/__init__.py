"""Configs: one page each. `from configs import tiny` lets one build on another."""
