"""SimCLR with lightly: python lightly_simclr.py IMAGES [EPOCHS [SIZE [BATCH_SIZE]]]."""

import os
import sys
import time

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader


def main(images: str, epochs: int = 10, size: int = 128, batch_size: int = 64) -> None:
    """Train and print the loss and the speed of every epoch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(device)
    criterion = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    dataset = LightlyDataset(images, transform=SimCLRTransform(input_size=size))
    loader = DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1
    )

    for epoch in range(epochs):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        for views, _, _ in loader:
            x0, x1 = (view.to(device) for view in views)
            loss = criterion(model(x0), model(x1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        mean = (total / len(loader)).item()
        speed = 2 * batch_size * len(loader) / (time.perf_counter() - began)
        print(f"epoch {epoch + 1}: loss {mean:.3f}, {speed:.0f} views/s")


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
