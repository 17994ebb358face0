"""The HTTP face of the batcher: an OpenAI-compatible server."""
