"""Tensor parallelism: every layer's heads and features divided over processes, after the model's own plan.

Rank 0 is the engine: it schedules, samples, and sends each plan to the others, which run it too.
"""
