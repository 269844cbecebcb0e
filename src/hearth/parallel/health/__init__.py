"""Health of a job's processes: heartbeats they write, what a watcher makes of them, and their stacks."""
