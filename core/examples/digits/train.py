"""Make the example: split scikit-learn's digits, train the network, write its weights. Takes about a minute.

    pip install torch scikit-learn safetensors
    python train.py

The data are "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI, 1998; CC BY 4.0), 1797 images
of 8x8 pixels in 0…16. The split is stratified and fixed by its seed: 1297 to train, 500 to test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from models import digits_net

FOLDER = Path(__file__).parent
EPOCHS, BATCH, RATE, SEED = 60, 64, 5e-3, 0


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in another order would give other weights
    torch.use_deterministic_algorithms(True)
    digits = load_digits()
    pixels, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    parts = train_test_split(pixels, labels, test_size=500, random_state=SEED, stratify=labels)
    train_x, test_x, train_y, test_y = parts
    np.savez_compressed(FOLDER / "train.npz", x=train_x, y=train_y)
    np.savez_compressed(FOLDER / "test.npz", x=test_x, y=test_y)
    network = digits_net()
    train(network, prepare(train_x), torch.from_numpy(train_y).long())
    right = (network(prepare(test_x)).argmax(1).numpy() == test_y).mean()
    print(f"{100 * right:.2f} % of {len(test_y)} test images")  # noqa: T201
    save_file(network.state_dict(), FOLDER / "digits.safetensors")


def prepare(pixels: np.ndarray) -> Tensor:
    """The recipe's preprocessing: (pixel / 16 - 0.5) / 0.5."""
    return (torch.from_numpy(pixels)[:, None].float() / 16 - 0.5) / 0.5


def train(network: nn.Module, x: Tensor, y: Tensor) -> None:
    """AdamW with a one-cycle rate, label smoothing, and shifts by up to one pixel."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))[: len(x) // BATCH * BATCH]
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(shift(x[rows])), y[rows], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def shift(x: Tensor) -> Tensor:
    down, right = (int(value) for value in torch.randint(0, 3, (2,)))
    return nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)[:, :, down : down + 8, right : right + 8]


if __name__ == "__main__":
    main()
