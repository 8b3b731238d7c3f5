"""Depth strategies: ways to execute a stack of blocks."""
