"""What is kept: checkpoints, runs and their numbers, in MLflow and on this disk until it has them.

Nothing else knows MLflow.
"""
