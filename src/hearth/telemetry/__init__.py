"""What Hearth tells about itself while it runs: metric names, Prometheus metrics, structured logs.

Contract: this room knows nothing of models or HTTP; callers push numbers in. ``names`` is the only module of
the package that holds the name of a metric or span. Prompt text, answers and secrets never enter a log line
or a label.
"""
