"""Directions: from gradients to updates before rate and decay. One file each."""
