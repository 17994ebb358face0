"""Eviction policies at work: replay of whole traces, prefill and decoding."""
