"""A model that other MLflow code registered, measured with lsa."""

import mlflow
import torch
from sklearn.datasets import load_digits
from torch import nn

import lsa

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)

# What somebody else did: train, then log and register by MLflow's own means.
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(x), y).backward()
    optimizer.step()
with mlflow.start_run(run_name="theirs"):
    mlflow.pytorch.log_model(
        network.eval(), name="theirs", registered_model_name="theirs", input_example=x[:2].numpy()
    )

# What lsa needs: a module, and tensors of the data that it shall be measured on. MLflow's format
# is a traced graph, which runs no code of theirs; its batch norm and dropout are as they were
# traced. One that is pickled does run code: load it only from people whom you trust.
model = mlflow.pytorch.load_model("models:/theirs/1")
landscape = lsa.Landscape(model, x, y)
result = lsa.lanczos(landscape, k=3, density_probes=0)

with mlflow.start_run(run_name="lanczos of theirs"):
    for name, metric in result.metrics.items():
        mlflow.log_metric(name, metric.value)
        for source, error in metric.errors.items():
            mlflow.log_metric(f"{name}_se_{source}", error)
top = result.metrics["lambda_max"]
print(f"lambda_max {top.value:.6g} ± {top.errors['data']:.2g}")
