"""The search: space, samplers, schedulers and budget, which trial comes next, and Ray Tune that runs them."""
