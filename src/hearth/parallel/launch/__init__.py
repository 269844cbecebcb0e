"""Launching a job's processes: on this machine, by torchrun, Slurm, Kubernetes, Ray or Azure ML."""
