"""What a network costs: parameters, floating-point operations, peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regpipe.networks.weights import channels_of


def parameters(network: nn.Module) -> int:
    """How many numbers the network holds, frozen ones included."""
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def flops(network: nn.Module, shape: Sequence[int]) -> int:
    """Floating-point operations of one forward pass on one pair of this grid (torch's counter: convolutions
    and matrix products, a multiply and an add count as two)."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 2 * channels_of(network), *shape, device=device))
    network.train(training)
    return counter.get_total_flops()


def peak_memory() -> int:
    """Most bytes that this process has held so far: resident memory, or what CUDA reserved where it was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:  # Linux: getrusage's maximum is also that of the process which started this one
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024
