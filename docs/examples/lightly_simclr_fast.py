"""SimCLR with lightly and views of vi_simsiam.

python lightly_simclr_fast.py IMAGES [EPOCHS [SIZE [BATCH_SIZE]]]
"""

import sys
import time

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data import MultiViewLoader


def main(images: str, epochs: int = 10, size: int = 128, batch_size: int = 64) -> None:
    """Train and print the loss and the speed of every epoch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(device)
    criterion = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    policy = AugmentConfig(size=size, crop_scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2))
    loader = MultiViewLoader(LightlyDataset(images), policy, batch_size, device)

    for epoch in range(epochs):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in loader:
            x0, x1 = batch.views
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
