"""Traces to train and evaluate on, and benchmark questions."""
