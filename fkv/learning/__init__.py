"""What scorers learn from and how: Golden Eviction, the supervised stage, GRPO, pretraining."""
