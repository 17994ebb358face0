"""Training: Golden Eviction, the supervised stage, GRPO, and pretraining of the reasoner."""
