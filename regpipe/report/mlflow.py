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

from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler

from regpipe.report.tensorboard import training_terms
from regpipe.report.tensorboard_pages import plain


def adapt(handlers: Iterable[Any], settings: Mapping[str, Any], folder: str, *, close: Engine | None = None) -> None:
    """Give the MLflow handlers among ``handlers`` one run, with the settings as its parameters.

    Args:
        handlers: of an engine that has not run yet, any.
        settings: what the run's parameters are; with ``folder`` they name the run, unless it was named: the same
            training goes on in the run that it began, another one begins its own.
        folder: where the weights are.
        close: end the run when this engine is done.
    """
    about = json.dumps([dict(settings), folder], default=str, sort_keys=True)
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    for handler in (h for h in handlers if isinstance(h, MLFlowHandler)):
        handler.run_name = handler.run_name or f"{settings['backbone']} {digest}"
        handler.experiment_param = {name: plain(value) for name, value in settings.items()}
        # MONAI's ``DIR + '/config.json'``, an expression unless ``--output_dir`` makes it a text, as a path
        told = r" \+ '(/config_\w+\.json)'$"
        handler.artifacts = tuple(path and re.sub(told, r"\1", str(path)) for path in handler.artifacts)
        if close is not None:
            close.add_event_handler(Events.COMPLETED, handler.close)
        handler.output_transform = training_terms
