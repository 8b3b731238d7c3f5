"""One training step of the same small model, written three ways, each as a worker of `benchmarks.workers`."""
