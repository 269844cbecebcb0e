"""Attention over paged keys and values: the interface to transformers, and two ways to compute it."""
