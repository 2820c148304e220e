"""What several test files share: MONAI's own command line in this process, a tiny cohort, a trained bundle."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors, and threads that wait for each other

import sys

import fire
import hypothesis
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture

from regpipe.bundle.write import write_bundle
from regpipe.io.images import Grid, save_grid
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms.cohort import write_cohort

if TYPE_CHECKING:
    from registered import Pair

DATA = Path(os.environ.get("REGPIPE_DATA", Path(__file__).parents[2] / "shared" / "data"))
RNG = np.random.default_rng(1)
QUICK = Path(__file__).parents[1] / "configs" / "quick.yaml"
COMMANDS = ("run", "verify_metadata", "verify_net_in_out", "ckpt_export")

Command = Callable[..., None]

# The same examples every time, and no clock: a test fails for what it finds, not for where it runs. For a deeper
# search: HYPOTHESIS_PROFILE=search python -m pytest tests/test_properties.py
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=30, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@contextmanager
def as_if_in_its_own_process() -> Iterator[None]:
    """Brings back what a bundle's run changes for the rest of its process: error hook, loggers, import path."""
    hook, path, root = sys.excepthook, list(sys.path), logging.getLogger()
    ours = logging.getLogger("regpipe")
    state = [(log, list(log.handlers), log.level, log.propagate) for log in (root, ours)]
    try:
        yield
    finally:
        sys.excepthook, sys.path[:] = hook, path
        for log, handlers, level, propagate in state:
            log.handlers[:], log.level, log.propagate = handlers, level, propagate


@pytest.fixture(scope="session")
def monai_bundle() -> Command:
    """``python -m monai.bundle ARGUMENTS``, parsed by its own parser, without ten seconds of imports."""

    def command(*arguments: object) -> None:
        known = {name: getattr(monai.bundle, name) for name in COMMANDS}
        with as_if_in_its_own_process():
            fire.Fire(known, command=[str(a) for a in arguments], name="monai.bundle")

    return command


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five 2D pairs of 32 x 32 pixels with labels, landmarks and true displacements."""
    return write_cohort(tmp_path_factory.mktemp("data") / "cohort", shape=(32, 32), n_pairs=5)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cohort: Path, monai_bundle: Command) -> Path:
    """A bundle trained on the cohort for two epochs. Do not write into it."""
    bundle = write_bundle("resnet18", tmp_path_factory.mktemp("trained") / "bundle")
    (bundle / "models").rmdir()  # git keeps no empty folder
    train(monai_bundle, bundle, cohort, "--holdout", 2)
    return bundle


def train(command: Command, bundle: Path, data: Path, *options: object, overlay: Path = QUICK) -> None:
    configs = str([str(bundle / "configs" / "train.yaml"), str(overlay)])
    command("run", "training", "--config_file", configs, "--bundle_root", bundle, "--dataset_dir", data, *options)


def evaluate(command: Command, bundle: Path, data: Path, *options: object, overlay: Path = QUICK) -> None:
    configs = str([str(file) for file in (bundle / "configs/train.yaml", overlay, bundle / "configs/evaluate.yaml")])
    command("run", "evaluating", "--config_file", configs, "--bundle_root", bundle, "--dataset_dir", data, *options)


def infer(command: Command, bundle: Path, data: Path, out: Path, *options: object) -> None:
    config = bundle / "configs" / "inference.yaml"
    command(
        "run", "--config_file", config, "--bundle_root", bundle, "--dataset_dir", data, "--output_dir", out, *options
    )


def deforming_bundle(folder: Path, grid: Grid, *, backbone: str = "alexnet", gain: float = 300.0) -> Path:
    """A bundle whose model was never trained but moves things by voxels: flow weights of 0.001 raised by ``gain``."""
    bundle = write_bundle(backbone, folder)
    torch.manual_seed(0)
    net = SymmetricNet(len(grid.shape), backbone)
    for level in net.levels:
        level.flow.weight.data *= gain  # type: ignore[union-attr, operator]
    torch.save(net.state_dict(), bundle / "models" / "model.pt")
    save_grid(bundle / "models" / "working_grid.json", grid)
    return bundle


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} in {DATA}; set REGPIPE_DATA to the folder of real images")
    return DATA / name


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def volume(shape: tuple[int, ...] = (6, 7, 8)) -> np.ndarray:
    return RNG.random(shape).astype(np.float32)


def two_folders(root: Path, n: int = 4) -> Path:
    for i in range(n):
        for side in ("fixed", "moving"):
            save(root / f"{side}_images" / f"c{i}.nii.gz", volume())
            save(root / f"{side}_labels" / f"c{i}.nii.gz", np.ones((6, 7, 8), np.uint8))
            (root / f"{side}_landmarks").mkdir(exist_ok=True)
            (root / f"{side}_landmarks" / f"c{i}.csv").write_text("x,y,z\n-1,-2,3\n-2,-2,1\n")
    return root


def frames(root: Path, n: int = 12) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Picture.fromarray(RNG.integers(0, 255, (8, 9), dtype=np.uint8)).save(root / f"f{i}.png")
    return root


def subjects(cases: list[dict[str, str]]) -> set[str]:
    return {c[f"{side}_image"] for c in cases for side in ("fixed", "moving")}


@pytest.fixture(scope="module", params=[2, 3])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A registered pair on disk, 2-D and 3-D: ``registered.Pair``."""
    from registered import make_pair  # brings ITK, which most tests do without

    return make_pair(tmp_path_factory.mktemp(f"pair{request.param}d"), request.param)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same in 2-D only."""
    from registered import make_pair

    return make_pair(tmp_path_factory.mktemp("flat"), 2)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the processes that torchrun starts: sums over two threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)
