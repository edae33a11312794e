"""Benchmarks of lm-evaluation-harness: loading, running and scoring them, and what arms do to them."""
