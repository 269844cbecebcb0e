"""Steps, failures and checkpoints of many processes, on the planner's model."""
