"""Train a digit classifier with a training loop written out by hand: the script to read first.

    python scripts/train_plain.py
    python scripts/train_plain.py --epochs 5 --lr 0.002

`train_mnist.py` does the same with what one wants later: validation, checkpoints, resume, schedules, a better network.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
from torchbasics import load_mnist


class Net(nn.Module):
    """Two convolutions and two linear layers, for images (B, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2),  # (B, 16, 13, 13)
            nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),  # (B, 32, 5, 5)
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(32 * 5 * 5, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))  # (B, 10): one score per class


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="./data", help="where MNIST is, or is downloaded to (default: ./data)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images (default: 3)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 0.001)")
    args = parser.parse_args(argv)

    torch.manual_seed(42)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Batches are (images (B, 1, 28, 28), labels (B,)); without MNIST and network the images are drawn by the program.
    train_loader, test_loader = load_mnist(args.batch_size, args.data_dir, name="auto", device=device)
    model = Net().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    print(f"training on {len(train_loader.dataset):,} images, {device}", flush=True)

    for epoch in range(1, args.epochs + 1):
        start, loss_sum = time.time(), 0.0
        model.train()
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()  # 1. forget the gradient of the last step, to which backward would add
            loss = criterion(model(images), labels)  # 2. forward: scores, then their loss
            loss.backward()  # 3. backward: the gradient of the loss for every weight
            optimizer.step()  # 4. move every weight a little against its gradient
            loss_sum += loss.item() * len(labels)  # 5. keep count: a mean over images, not over batches

        correct = 0
        model.eval()  # dropout and batch normalisation, if there were any, behave differently
        with torch.no_grad():
            for images, labels in test_loader:  # to choose between models, hold out other images: see train_mnist.py
                images, labels = images.to(device), labels.to(device)
                correct += (model(images).argmax(1) == labels).sum().item()
        mean_loss, accuracy = loss_sum / len(train_loader.dataset), correct / len(test_loader.dataset)
        seconds = time.time() - start
        print(f"epoch {epoch}: training loss {mean_loss:.4f}, test accuracy {accuracy:.2%}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
