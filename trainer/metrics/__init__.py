"""Metrics: `metrics.jsonl` first, then the console, W&B and TensorBoard as mirrors of it. Imports no JAX."""

from trainer.metrics.jsonl import MetricsWriter, read_metrics

__all__ = ["MetricsWriter", "read_metrics"]
