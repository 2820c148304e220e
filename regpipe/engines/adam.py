"""Adam for one tensor, by torch's own function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """``torch.optim.Adam([parameter])``, the same to the bit; that one imports torch's compiler, which takes a second.

    Args:
        parameter: with a gradient when ``step`` is called.
        lr: learning rate.
        eps: see ``torch.optim.Adam``.
    """

    def __init__(self, parameter: Tensor, *, lr: float, eps: float) -> None:
        self.parameter, self.lr, self.eps = parameter, lr, eps
        self.mean, self.square, self.steps = torch.zeros_like(parameter), torch.zeros_like(parameter), torch.tensor(0.0)

    def zero_grad(self) -> None:
        self.parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        assert self.parameter.grad is not None
        lists: Any = [self.parameter], [self.parameter.grad], [self.mean], [self.square], [], [self.steps]
        told: dict[str, Any] = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "maximize": False}
        adam(*lists, lr=self.lr, eps=self.eps, **told)
