"""The model under eviction policies: replay of whole traces, prefill and decoding."""
