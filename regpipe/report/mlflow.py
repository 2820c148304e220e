"""MLflow, when a bundle is run with ``--tracking mlflow``: MONAI adds its handlers, this makes them fit.

MONAI's default reads a trainer's loss in a way that fails where outputs are not decollated, takes the oldest unfinished
run of an experiment for the one to go on with, and loses the saved configuration where ``--output_dir`` is given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from monai.handlers import MLFlowHandler

from regpipe.losses.terms import RegistrationLoss
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
    """Give the MLflow handlers among ``handlers`` the settings as parameters, and one run for them all; else nothing.

    To be called before the engine is made.

    Args:
        handlers: of an engine, any.
        settings: what the run's parameters are; with ``folder`` they name the run, unless it was named: the same
            training goes on in the run that it began, another one begins its own.
        folder: where the weights are.
        loss: whose terms are logged at each iteration.
        close: end the run when the engine is done.
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
