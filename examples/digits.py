"""A small convolutional net on scikit-learn's digits: real data, true labels."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn


class DigitsNet(nn.Module):
    """Three convolutions with batch normalization, one residual connection, 10 classes.

    Takes images [batch, 1, 8, 8] with values in [0, 1]; returns logits [batch, 10].
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        return self.head(torch.relu(x + self.block(x)))


def build() -> tuple[DigitsNet, tuple[torch.Tensor]]:
    """The net and an example input, as `edgepass estimate digits:build` takes them."""
    return DigitsNet(), (torch.zeros(1, 1, 8, 8),)


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images [n, 1, 8, 8] float32, training labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    return tuple(train_test_split(images, labels, test_size=0.4, random_state=0, stratify=labels))


def train(epochs: int = 12, seed: int = 0) -> DigitsNet:
    """The net after `epochs` of Adam on the training part."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the net is too small to share
    images, _, labels, _ = data()
    net = DigitsNet()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()
