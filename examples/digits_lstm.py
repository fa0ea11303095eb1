"""An LSTM that reads scikit-learn's digits row by row: 8 steps of 8 pixels, 128 units, 72,000 parameters.

    python examples/digits_lstm.py      # trains it: about 98 % on the test digits, a minute on one core
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "digits_lstm-seed0.safetensors"
EPOCHS = 60


class DigitsLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 128, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.lstm(images.reshape(-1, 8, 8))
        return self.head(states[:, -1])


def digits_lstm() -> nn.Module:
    return DigitsLSTM()


def digits_lstm_trained() -> nn.Module:
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is missing; run: python examples/digits_lstm.py")
    net = digits_lstm()
    net.load_state_dict(load_file(WEIGHTS))
    return net


def main() -> None:
    from train_fashion_mnist import accuracy

    from pared import sources

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = sources.data("digits", batch_size=64, seed=0).task
    net = digits_lstm()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, EPOCHS * len(task.train), pct_start=0.2)
    for _ in range(EPOCHS):
        for images, labels in task.train:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), WEIGHTS)
    print(f"validation {accuracy(net, task.val):.2f} %, test {accuracy(net, task.test):.2f} %, saved to {WEIGHTS}")


if __name__ == "__main__":
    main()
