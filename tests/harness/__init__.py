"""The harnesses; tasks from local files, and a checkpoint to ask, made on the spot."""
