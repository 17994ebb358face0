"""The fixed-shape cache, attention over it, an eviction's statistics, and the decode kernel."""
