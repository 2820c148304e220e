"""What a test adds to the package's registries, taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regpipe.losses.terms import TERMS
from regpipe.metrics import METRICS
from regpipe.networks.encoders import BACKBONES
from regpipe.report.pictures import PICTURES
from regpipe.transforms.export import FORMATS


@contextmanager
def restored() -> Iterator[None]:
    """What is registered inside is gone after it."""
    registries: tuple[dict[str, Any], ...] = (TERMS, METRICS, BACKBONES, PICTURES, FORMATS)
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, kept in zip(registries, before, strict=True):
            registry.clear()
            registry.update(kept)
