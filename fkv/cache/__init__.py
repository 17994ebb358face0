"""The fixed-shape cache, attention over it, and an eviction's statistics."""
