"""One trial: its assignment, its attempts on Ray Train, a worker's share, its ends and retries."""
