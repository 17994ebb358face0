"""ForesightKV in JAX: KV-cache eviction learned from the attention that is still to come."""

__version__ = "0.1.0"
