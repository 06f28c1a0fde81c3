"""A torchvision ResNet-18 on a folder of images: no project, no tracking.

python examples/resnet_folder.py FOLDER    with the images of each class in FOLDER/<class>/
"""

import sys

import torch
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

import lsa

to_tensor = Compose([Resize((32, 32)), ToTensor(), Normalize([0.5] * 3, [0.25] * 3)])
folder = ImageFolder(sys.argv[1], to_tensor)
x, y = torch.stack([image for image, _ in folder]), torch.tensor(folder.targets)

torch.manual_seed(0)
model = resnet18(
    num_classes=len(folder.classes)
)  # weights="DEFAULT" and a new fc: a pretrained one
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for _ in range(10):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()

# In evaluation mode: batch norm on its running statistics, so each image counts by itself.
landscape = lsa.Landscape(model, x, y)
print(
    f"{len(x)} images, {landscape.dimension} parameters, loss {landscape.loss(landscape.theta):.4g}"
)
result = lsa.lanczos(landscape, k=1, k_min=0, density_probes=0, split="no")
for name, metric in result.metrics.items():
    errors = "".join(f" ± {error:.2g} ({source})" for source, error in metric.errors.items())
    print(f"{name:24} {metric.value:.4g}{errors} {metric.unit}")
print("\n".join(result.notes))
