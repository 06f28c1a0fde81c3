"""MLflow: runs, the model registry, and what waits while a server is away.

Nothing is imported here, since MLflow itself loads `lsa.tracking.mlflow_plugin`.
"""
