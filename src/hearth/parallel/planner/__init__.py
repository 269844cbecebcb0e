"""Which layout a job needs, how much memory, and how fast it will be: pure arithmetic on a model's shape."""
