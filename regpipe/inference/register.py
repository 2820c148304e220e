"""What ``regpipe register`` does, as functions: a folder of pairs, or two images of a Python session."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regpipe.bundle.run import own, register_with_bundle
from regpipe.bundle.write import TRANSFERRED
from regpipe.data.members import KINDS
from regpipe.data.pairs import SIDES
from regpipe.engines.channels import ALIKE, Channels
from regpipe.engines.inferers import dimensions_of
from regpipe.engines.refine import SHIPPED_STEPS, ZERO_STEPS, refinement_loss
from regpipe.inference.by_bundle import register_by_bundle
from regpipe.inference.from_zero import register_from_zero
from regpipe.inference.symnet import register_by_symnet
from regpipe.io import images
from regpipe.io.images import Image
from regpipe.io.itk_bridge import affine_mat, from_itk
from regpipe.io.labels import ids_of, read_label
from regpipe.io.planes import standing
from regpipe.networks.weights import BEST, shipped
from regpipe.transforms.displacement import read_displacement, write_image
from regpipe.transforms.initial import named
from regpipe.utils import console
from regpipe.utils.errors import InputError, cause
from regpipe.utils.files import replace_file
from regpipe.utils.settings import LOSS, AffineOptions, RefinementOptions, names, taken

BESIDE = tuple(f"{side}_{kind}" for kind in KINDS if kind != "image" for side in SIDES)

# what inference by a bundle does without MONAI
OF_OWN = {*names(AffineOptions), *names(RefinementOptions), "ckpt_dir", "refine", "pairing", "jobs"}
OF_OWN |= {"formats", "fill", "memory_gib", "strict", "uncertainty", "rigid", "guide_labels", "channels"}


def register_files(
    dataset: Path,
    out: Path,
    *,
    bundle: str | None = None,
    refine: int | None = None,
    network: str | None = None,
    weights: str | None = None,
    trust: bool = False,
    **chosen: Any,
) -> None:
    """Register a folder, or datalist, of pairs: by a bundle, one that came with regpipe, or without any (``none``).

    Args:
        dataset: see ``regpipe.list_pairs``.
        out: a folder per case is made in it.
        bundle: its folder, a comparison's, or the name of one that came with regpipe; ``none``. By default
            ``networks.weights.BEST`` of the images' dimension.
        refine: steps of per-pair optimisation; None: 25 after a model that came with regpipe, 80 from zero, else the
            bundle's own.
        network, weights: ``symnet`` in a bundle's place, and its authors' file, see ``inference.symnet``.
        trust: see ``bundle.own``.
        chosen: ``AffineOptions``, ``RefinementOptions``; ids of the bundle's ``inference.yaml``, of which
            ``inference.from_zero`` takes its own.

    Raises:
        InputError: what a user can mend.
        SystemExit: as ``FolderRun.register``.
    """
    chosen = {name: value for name, value in chosen.items() if value not in (None, (), [])}
    if network is not None or weights is not None:
        if network != "symnet" or weights is None:
            raise InputError("--network symnet and --weights FILE, its authors' .pth, go together; else give --bundle")
        if refine is not None or any(name in chosen for name in names(RefinementOptions)):
            raise InputError("--network symnet: its two velocities cannot be refined; leave the refinement out")
        register_by_symnet(str(dataset), str(out), weights=weights, **chosen)
        return
    found = bundle_named(bundle, dataset)
    given = taken(RefinementOptions, chosen)
    asked = RefinementOptions(**given)
    refinement_loss(**asked.loss)
    channels = Channels.of(asked)
    if found is None:
        steps = ZERO_STEPS if refine is None else refine
        register_from_zero(str(dataset), str(out), steps=steps, **given, **chosen)
        return
    folder, told = found
    steps = told.get("refine", 0) if refine is None else refine
    if given and not steps:
        told_of = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{told_of}: with a bundle needs --refine STEPS, 0 by default")
    told |= chosen | ({} if refine is None else {"refine": refine})
    found_own = own(folder)
    if found_own is not None and told.keys() <= OF_OWN:
        places = (str(path.expanduser().absolute()) for path in (dataset, out))
        register_by_bundle(*found_own, *places, **(given | told))
        return
    if "jobs" in told:
        raise InputError(f"{folder}: --jobs goes with regpipe's own configurations; start this one by torchrun")
    if asked.guide or channels != ALIKE or {"channels", "rigid"} & told.keys():
        raise InputError(f"{folder}: --guide, --rigid and several channels go with regpipe's own configurations")
    told |= {"refine_finest": asked.finest} if "finest" in given else {}
    told |= {"features": asked.features} if "features" in given else {}
    if not given.keys().isdisjoint(LOSS):
        told["refine_loss"] = _refine_loss(asked.loss)
    register_with_bundle(folder, dataset, out, told, trust=trust)


def bundle_named(name: str | None, dataset: Path) -> tuple[Path, dict[str, Any]] | None:
    """The bundle of that name, a folder or one that came with regpipe, and ids to give it; None: from zero.

    A bundle that came with regpipe goes before a folder of the same name. A message says where regpipe has none for the
    images' dimension, or the images are of both dimensions.
    """
    if name == "none":
        return None
    if name is not None and name not in TRANSFERRED:
        return Path(name), {}
    dims = dimensions_of(str(dataset))
    if len(dims) > 1:
        console.say("images of both 2D and 3D, and a network takes one of them: each pair is optimised from zero")
        return None
    (dim,) = dims
    name = name or BEST[dim]
    if name == "none":
        return None
    found = shipped(name, dim)
    if found is None:
        console.say(f"regpipe came without a model of {name} for {dim}D images: each pair is optimised from zero")
        return None
    return found, {"ckpt_dir": str(found.absolute() / "models" / f"{dim}d"), "refine": SHIPPED_STEPS}


def _refine_loss(loss: Mapping[str, Any]) -> str:
    """The expression for a bundle's ``refine_loss``."""
    words = ", ".join(f"{name}={value!r}" for name, value in loss.items())
    return f"$regpipe.engines.refine.refinement_loss(structures=@structures, spatial_dims=len(@grid.shape), {words})"


def one_pair(path: Path, files: Mapping[str, Path | Sequence[Path] | None]) -> Path:
    """Write a datalist of one case at ``path``. Raises ``InputError`` for a file that is not there."""
    given = {key: [file] if isinstance(file, Path) else file for key, file in files.items() if file}
    lists = {key: [str(file.absolute()) for file in several] for key, several in given.items()}
    entry = {key: found[0] if len(found) == 1 else found for key, found in lists.items()}
    for name in itertools.chain(*lists.values()):
        files_of = images.files(name)
        if not files_of or not all(file.exists() for file in files_of):
            raise InputError(f"{name}: no such file, or a folder without DICOM files")
    path.write_text(json.dumps({"test": [entry]}))
    return path


class Registered:
    """What ``register_images`` gave: read from its files, which are those of ``regpipe register``."""

    def __init__(self, aside: tempfile.TemporaryDirectory[str]) -> None:
        self._aside = aside  # gone with this object
        (finished,) = (Path(aside.name) / "out").glob("*/metrics.json")
        self.folder = finished.parent  # of the case
        self.metrics: dict[str, Any] = json.loads(finished.read_text())  # on the working grid; None: not known
        self.warnings: list[str] = self.metrics.pop("warnings")

    @functools.cached_property
    def warped(self) -> Image:
        """The moving image on the fixed one's grid, and its RAS affine."""
        return images.read_image(self.folder / "warped.nii.gz")

    @functools.cached_property
    def warped_label(self) -> Image:
        """The moving label map on the fixed image's grid, where one was given."""
        return read_label(self.folder / "warped_label.nii.gz")[0]

    @functools.cached_property
    def jacobian(self) -> Image:
        """det(I + grad u) on the fixed image's grid."""
        return images.read_image(self.folder / "jacobian.nii.gz")

    @functools.cached_property
    def displacement(self) -> Image:
        """(D, *S) in LPS mm on the fixed image's grid, from each voxel to its place in the moving image."""
        return Image(*read_displacement(self.folder / "displacement.nii.gz"))

    @functools.cached_property
    def inverse(self) -> Image:
        """The same on the moving image's grid, towards the fixed image."""
        return Image(*read_displacement(self.folder / "inverse_displacement.nii.gz"))

    @property
    def uncertainty(self) -> Image:
        """How far off each place may be, mm, on the fixed image's grid: of ``uncertainty=True``."""
        return images.read_image(self.folder / "uncertainty.nii.gz")

    def save(self, folder: str | Path) -> Path:
        """Copy all files to ``folder``, as ``regpipe register -o`` writes them; returns it."""
        return Path(shutil.copytree(Path(self._aside.name) / "out", folder, dirs_exist_ok=True))


def register_images(fixed: Any, moving: Any, **chosen: Any) -> Registered:
    """Register two images as ``regpipe register`` does: the same numbers, the same files.

    Args:
        fixed, moving: each a path, a pair ``(array (*S), RAS affine (D+1, D+1))``, a MONAI ``MetaTensor`` of one
            channel, a nibabel image or an ``itk.Image``; or a list of such, of one grid: channels.
        chosen: as the command's options; as the images: ``fixed_label``, ``moving_label``, ``fixed_mask``,
            ``moving_mask``, ``fixed_ignore``, ``moving_ignore``; paths: ``fixed_landmarks``, ``moving_landmarks``;
            ``initial``: a transform file, a list of them (``transforms.initial.named``), or a matrix (D+1, D+1) in RAS
            mm, fixed point -> moving point.

    Raises:
        InputError: what is wrong with them, in a line.
    """
    aside = tempfile.TemporaryDirectory(prefix="regpipe")
    root = Path(aside.name)
    given = {key: chosen.pop(key, None) for key in BESIDE}
    files: dict[str, Any] = {k: _file(root / f"{k}.nii.gz", value) for k, value in given.items() if value is not None}
    for key, value in (("fixed_image", fixed), ("moving_image", moving)):
        many = value if isinstance(value, list) else [value]
        files[key] = [_file(root / f"{key}{i or ''}.nii.gz", one) for i, one in enumerate(many)]
    files |= _initial(root / "initial.mat", chosen.pop("initial", None))
    with _in_a_session():
        register_files(one_pair(root / "pair.json", files), root / "out", **chosen)
    return Registered(aside)


@contextlib.contextmanager
def _in_a_session() -> Iterator[None]:
    """Turns what would end a command into an ``InputError``, and leaves the process as it was."""
    hooks, places = (sys.excepthook, threading.excepthook), list(sys.path)
    try:
        with console.session(quiet=True):
            yield
    except SystemExit as end:
        failures = console.told().get("failures") or {"": "the registration was stopped"}
        raise InputError(*failures.values()) from end
    except Exception as error:  # any: what a user can mend becomes an ``InputError``, all else goes on
        known = cause(error)
        if known is None or known is error:
            raise
        raise InputError(*known.args) from error
    finally:
        sys.excepthook, threading.excepthook = hooks
        sys.path[:] = places


def _file(path: Path, value: Any) -> Path:
    """The file of an image: the given one; an image in memory is written to ``path``."""
    if isinstance(value, (str, Path)):
        return Path(value)
    array, affine, *_ = _image(value)
    kept = ids_of(array, path.name) if path.name.endswith("label.nii.gz") else array.astype(np.float32)
    write_image(path, kept, affine)
    return path


def _initial(path: Path, value: Any) -> dict[str, Path]:
    """The initial transforms of a case; a matrix is written to ``path``."""
    if isinstance(value, np.ndarray):
        replace_file(path, affine_mat(value))
        value = path
    return named([] if value is None else [value] if isinstance(value, (str, Path)) else value)


def _image(value: Any) -> Image:
    if isinstance(value, Image):
        return standing(value)
    if isinstance(value, tuple) and len(value) == 2:
        array, affine = (np.asarray(part) for part in value)
    elif hasattr(value, "GetDirection"):
        return from_itk(value)
    elif hasattr(value, "affine"):  # MONAI's MetaTensor, which has a channel; nibabel's
        array, affine = np.asarray(getattr(value, "dataobj", value)), np.asarray(value.affine)
        array = array[0] if hasattr(value, "meta") else array
    else:
        kind = type(value).__name__
        raise InputError(f"an image is a {kind}: give a path, (array, affine), a MetaTensor, a nibabel or an ITK image")
    return Image(array, _of_dimension(affine.astype(float), array.ndim))


def _of_dimension(affine: np.ndarray, dim: int) -> np.ndarray:
    """The affine (dim+1, dim+1); MONAI's is (4, 4) for slices, too."""
    if affine.shape == (4, 4) and dim == 2:
        affine = affine[np.ix_([0, 1, 3], [0, 1, 3])]
    if affine.shape != (dim + 1, dim + 1):
        raise InputError(f"an array of {dim} axes and an affine of {affine.shape}: give one channel, and RAS mm")
    return affine
