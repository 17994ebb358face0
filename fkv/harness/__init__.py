"""Evaluation harnesses of others over models under eviction: lm-evaluation-harness, lighteval.

Both are packages of their own, which only the modules that adapt to them import: `lm`, `tasks` and
`lighteval_model`.
"""
