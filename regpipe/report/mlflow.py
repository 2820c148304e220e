"""Adapts the MLflow handlers that MONAI adds to a bundle with ``--tracking mlflow``.

As they are, they fail on a trainer's loss where outputs are not decollated, continue the oldest unfinished run of an
experiment, and lose the saved configuration where ``--output_dir`` is given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from monai.handlers import MLFlowHandler

from regpipe.losses.loss import RegistrationLoss
from regpipe.report.tensorboard import tag_terms
from regpipe.report.tensorboard_pages import plain


def adapt(
    handlers: Iterable[Any],
    settings: Mapping[str, Any],
    folder: str,
    *,
    loss: RegistrationLoss | None = None,
    close: bool = False,
) -> None:
    """Give the MLflow handlers among ``handlers`` one run, with the settings as its parameters.

    Call it before the engine is made.

    Args:
        handlers: all handlers of an engine.
        settings: the run's parameters. With ``folder`` they name the run, unless it has a name: a training that is
            resumed continues its run, another training begins a new one.
        folder: where the weights are.
        loss: its terms are logged at each iteration.
        close: end the run with the engine.
    """
    about = json.dumps([dict(settings), folder], default=str, sort_keys=True)
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    for handler in (h for h in handlers if isinstance(h, MLFlowHandler)):
        handler.run_name = handler.run_name or f"{settings['backbone']} {digest}"
        handler.experiment_param = {name: plain(value) for name, value in settings.items()}
        handler.artifacts = tuple(_path(path) for path in handler.artifacts)
        handler.close_on_complete |= close
        if loss is not None:
            handler.output_transform = lambda _: tag_terms(loss.terms, "training")


def _path(written: str | None) -> str | None:
    """MONAI's ``DIR + '/config.json'``, an expression unless ``--output_dir`` makes it a text, as a path."""
    return written and re.sub(r" \+ '(/config_\w+\.json)'$", r"\1", str(written))
