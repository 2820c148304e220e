"""A bundle's own inference, run from here: only configurations that are regpipe's own, or trusted."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from regpipe.bundle.own import backbone_of, difference, require_own
from regpipe.utils.errors import InputError

BEST = "best"  # in a comparison's folder: names its best bundle


def bundle_in(folder: Path) -> Path:
    """``folder`` itself, or the best bundle of a comparison in it."""
    best = folder / BEST
    return folder / Path(best.read_text().strip()).name if best.is_file() else folder


def own(folder: Path) -> tuple[Path, str] | None:
    """The bundle that ``folder`` is or holds, and its backbone, where its inference is regpipe's own; else None."""
    bundle = bundle_in(folder).absolute()
    config = bundle / "configs" / "inference.yaml"
    with contextlib.suppress(InputError):  # what is damaged is told by who runs it
        if config.is_file() and not difference(bundle, [config.name]):
            return bundle, backbone_of(config)
    return None


def _trusted(folder: Path, trust: bool) -> Path:
    """The bundle that ``folder`` is or holds, its configuration regpipe's own or trusted; its whole path."""

    bundle = bundle_in(folder).absolute()
    config = bundle / "configs" / "inference.yaml"
    if not config.is_file():
        raise InputError(f"{config}: no such file; give a bundle folder, one with configs/ and models/")
    require_own(bundle, [config.name], trust=trust)
    return bundle


def register_with_bundle(
    bundle: Path, dataset: Path, out: Path, chosen: dict[str, Any], *, trust: bool = False
) -> None:
    """Run a bundle's inference with some ids of its configuration given.

    Raises:
        InputError: no bundle, one with a configuration of its own that is not trusted, and what its inference refuses.
        SystemExit: as ``inference.folder.FolderRun.register``.
    """
    from monai.bundle import ConfigWorkflow

    bundle = _trusted(bundle, trust)
    configs = bundle / "configs"
    try:
        workflow = ConfigWorkflow(
            str(configs / "inference.yaml"),
            workflow_type="infer",
            meta_file=str(configs / "metadata.json"),
            logging_file=str(configs / "logging.conf"),
            bundle_root=str(bundle),
            dataset_dir=str(dataset.expanduser().absolute()),  # whole: a name that begins with $ would be run
            output_dir=str(out.expanduser().absolute()),
            **chosen,
        )
    except Exception as error:  # nothing is evaluated yet: YAML's, JSON's or logging's error for one of the files
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{configs}: not a bundle's configuration ({reason}); copy the bundle anew") from error
    workflow.initialize()
    workflow.run()
