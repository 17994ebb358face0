"""Traces to train and measure on."""
