"""The three bundles, written from one template: they differ in the backbone's id and in nothing else."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from regpipe.networks.encoders import BACKBONES, TRANSFERRED
from regpipe.networks.weights import shipped
from regpipe.utils.errors import InputError

PLACEHOLDER = "@BACKBONE@"
METADATA, NOT_MEASURED = "configs/metadata.json", '"eval_metrics": {}'


def write_bundle(backbone: str, folder: str | Path) -> Path:
    """Write the bundle of a backbone into ``folder``; files of the template that are there are replaced.

    What the metadata say of a model's measured performance stays.

    Raises:
        InputError: unknown backbone.
    """
    if backbone not in BACKBONES:
        raise InputError(f"unknown backbone '{backbone}': choose one of {', '.join(BACKBONES)}")
    folder = Path(folder)
    with resources.as_file(resources.files("regpipe.bundle") / "template") as template:
        for source in sorted(path for path in template.rglob("*") if path.is_file()):
            name = source.relative_to(template).as_posix()
            text, target = rendered(name, backbone), folder / name
            if name == METADATA:
                text = with_measured(text, measured(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    (folder / "models").mkdir(exist_ok=True)
    return folder


def rendered(name: str, backbone: str) -> str:
    """A file of the template, ``configs/train.yaml``, as it stands in the bundle of a backbone."""
    text = (resources.files("regpipe.bundle") / "template" / name).read_text(encoding="utf-8")
    return text.replace(PLACEHOLDER, backbone)


def measured(bundle: Path) -> dict[str, float]:
    """The ``eval_metrics`` of a bundle's metadata; none where it has no metadata."""
    path = bundle / METADATA
    return dict(json.loads(path.read_text(encoding="utf-8")).get("eval_metrics", {})) if path.is_file() else {}


def with_measured(metadata: str, values: dict[str, float]) -> str:
    """The template's metadata with ``values`` as its ``eval_metrics``."""
    return metadata.replace(NOT_MEASURED, f'"eval_metrics": {json.dumps(values)}')


def overlay(given: str | Path) -> Path:
    """The whole path of an overlay: a file, or the name of one that came with regpipe, ``prostate_mrus``.

    A path that is neither is given back as it is, for whoever opens it to refuse.
    """
    path, package = Path(given), Path(str(resources.files("regpipe")))
    if not path.is_file() and path.name == str(given):
        for folder in (package / "overlays", package.parent / "configs"):  # of a wheel, of a clone
            if (known := folder / f"{path.name.removesuffix('.yaml')}.yaml").is_file():
                return known
    return path.absolute()


def all_shipped() -> list[Path]:
    """Every bundle that came with regpipe and holds a model."""
    found = (shipped(backbone, dim) for backbone in TRANSFERRED for dim in (2, 3))
    return list(dict.fromkeys(bundle for bundle in found if bundle is not None))


def write_all(parent: str | Path) -> list[Path]:
    """``symreg_<backbone>`` for each transferred backbone, in ``parent``."""
    return [write_bundle(backbone, Path(parent) / f"symreg_{backbone}") for backbone in TRANSFERRED]
