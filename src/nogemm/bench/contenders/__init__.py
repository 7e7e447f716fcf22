"""The worker's side of benchmarks: what is timed."""
