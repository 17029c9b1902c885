# SPDX-License-Identifier: Apache-2.0
"""A training script of one's own in a federation. Only the lines with ``flare`` make it federated.

    hansa run examples/own_script/job.toml

Each site has a part of scikit-learn's handwritten digits (they come with the library, nothing is downloaded), and
seven tenths of it are of two or three classes: alone, a site learns little about the others.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import hansa.client as flare

NUM_SITES = 4


def make_model() -> nn.Module:
    """Return the model; the job's model.factory names this function, and training starts from its parameters."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def load_site(index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return this site's training rows, and everyone's test rows: inputs and labels."""
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    rows = torch.arange(len(labels))
    test = rows % 5 == 0
    evenly = rows % 10 < 3
    mine = torch.where(evenly, rows // 10 % NUM_SITES == index, labels % NUM_SITES == index) & ~test
    return inputs[mine], labels[mine], inputs[test], labels[test]


def main() -> None:
    """Train in every round from the shared model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()

    flare.init()
    inputs, labels, test_inputs, test_labels = load_site(int(flare.get_site_name().removeprefix("site-")) - 1)
    model = make_model()
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        with torch.no_grad():
            predictions = model(test_inputs).argmax(dim=1)
        accuracy = (predictions == test_labels).float().mean().item()
        loss = nn.functional.cross_entropy(model(test_inputs), test_labels).item()

        steps = 0
        if not flare.is_evaluate():
            torch.manual_seed(received.meta["seed"])
            optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9)
            for _ in range(arguments.epochs):
                for batch in torch.randperm(len(labels)).split(32):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
                    optimizer.step()
                    steps += 1
        print(f"round {received.current_round + 1}: accuracy {accuracy:.3f}, then {steps} steps")
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"accuracy": accuracy, "loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": steps, "num_examples": len(labels)},
            )
        )


if __name__ == "__main__":
    main()
