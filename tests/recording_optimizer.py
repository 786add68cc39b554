"""An optimizer that writes down the learning rates that it uses."""

from typing import Any

import torch


class Recorder(torch.optim.SGD):
    """SGD that writes down the rate of every group at every update."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, **options)
        self.used: list[list[float]] = []

    def step(self, closure: Any = None) -> None:
        self.used.append([float(group["lr"]) for group in self.param_groups])
        super().step()
