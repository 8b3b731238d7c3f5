"""Side-by-side measurements. Each is a command, `python -m benchmarks.NAME --help`, that prints a table and writes JSON."""
