"""The confirm phase: a plan frozen before its runs, and the runs."""
