"""The template of a group: a mean image that no subject draws to itself, and each subject's transform to it, both ways.

    middles laid onto each other -> mean -> each subject aligned with it, the mean of the logarithms taken out -> mean
    -> rounds: each subject's velocity refined against the mean, the mean velocity taken out, the images meaned anew

``A_i exp(v_i)`` takes a point of the template to its point of subject i; of a subject that is itself a mean the way
goes on to each of its images. Means of images are of the subjects' own voxels, each resampled once. What a phase makes
of a subject is a file of ``rounds/``, see ``group.phases``. Sums run in the order of the images' hashes, of a film in
that of its frames, whose motion is smooth over time: see ``group.film``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nibabel.affines import apply_affine
from torch import Tensor

from regpipe import __version__
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import Case, working_grid
from regpipe.data.placement import counted
from regpipe.engines.inferers import prepare_batch, without_folds
from regpipe.engines.pyramid import coarser_shape
from regpipe.fields.algebra import integrate, register, resize
from regpipe.fields.folds import repair
from regpipe.group.means import Mean, along_time, log_sum, mean_image, sharpness, without_mean
from regpipe.group.phases import Arrays, Phases
from regpipe.group.subjects import Subject
from regpipe.inference import jobs
from regpipe.inference.case_files import BY_DEFAULT, clear, save_case
from regpipe.io import images
from regpipe.io.geometry import voxel_size
from regpipe.io.images import Image
from regpipe.io.itk_bridge import affine_mat, composite, itk_field, sampled
from regpipe.io.source import Source
from regpipe.networks.encoders import VELOCITY_STRIDE
from regpipe.transforms import affine, displacement, initial
from regpipe.transforms.read import Space
from regpipe.utils import console, distributed
from regpipe.utils.errors import InputError
from regpipe.utils.files import parse_json, replace_file

ROUNDS, SUBJECTS = "rounds", "subjects"  # folders of the result
TEMPLATE, LABEL, PROBABILITY = "template.nii.gz", "template_label.nii.gz", "probability_{}.nii.gz"
WRITTEN = (TEMPLATE, LABEL, PROBABILITY.format("*"), "covered.nii.gz", "template.json", "template.png", "film*")
ALIGNED = 2  # times that the subjects are aligned with their mean
INSIDE = 0.5  # share of the subjects that must cover a place for it to count
Velocity = Callable[[Tensor, Tensor | None, Sequence[Tensor]], Tensor]  # (pair, the last round's, masks) -> velocity


class Stage(NamedTuple):
    """What is known after a stage: the mean, and how each subject gets there."""

    tag: str
    matrices: list[np.ndarray]  # A_i (D+1, D+1) RAS mm, template point -> subject's point
    space: Space
    round: int = 0  # whose velocities; 0: none


class Group:
    """A group on its way to a template, in a folder.

    Args:
        subjects: see ``group.subjects``.
        out: the folder of the result.
        settings: what the result depends on beside the images; another one begins anew.
        velocity: what a round finds of a pair (B, 2, *S) on the template's grid.
        processes: see ``inference.jobs``.
        over_time: of a film, the share (N, N) that each frame's motion has in each frame's, see ``group.film``.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        out: Path,
        *,
        settings: Mapping[str, Any],
        velocity: Velocity,
        processes: int = 1,
        over_time: np.ndarray | None = None,
    ) -> None:
        self.subjects, self.out, self.settings = list(subjects), out, dict(settings)
        self.velocity, self.over_time = velocity, over_time
        self.work = out / ROUNDS
        self.phases = Phases(self.work, self.subjects, processes)
        self.load = LoadPair(None, affine="none", cache=False)
        self.told: list[dict[str, float | str]] = []  # a line for each stage
        self._begin()

    def _begin(self) -> None:
        """Go on where the same command stopped; what another one left is removed."""
        about = [[one.name, one.sha256, one.beside_sha256()] for one in self.subjects]
        text = json.dumps([__version__, about, self.settings], sort_keys=True)
        digest, path = hashlib.sha256(text.encode()).hexdigest(), self.work / "made_from.json"
        if path.is_file() and parse_json(path.read_bytes()) == digest:
            return
        if jobs.started():
            raise SystemExit(0)
        if self.work.is_dir():
            console.say(f"{self.out}: holds a template of other images or settings, and is replaced")
            for folder in (self.work, self.out / SUBJECTS):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (file for pattern in WRITTEN for file in self.out.glob(pattern)):
                file.unlink()
        self.work.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(digest).encode())

    def run(self, stage: str, metric: str, rounds: int) -> tuple[Stage, Mean]:
        """All stages -> the last one and its mean."""
        last = self._middles(stage)
        mean = self._mean(last)
        for i in range(1, ALIGNED + 1 if stage not in ("none", "centre") else 1):
            last = self._aligned(last, f"{stage} {i}", stage, metric, first=i == 1)
            mean = self._mean(last)
        for i in range(1, rounds + 1):
            last = self._refined(last, i)
            mean = self._mean(last)
        return last, mean

    # ------------------------------------------------------------------------------------ stages

    def _middles(self, stage: str) -> Stage:
        grid = working_grid([{"case": "", "fixed_image": o.image, "moving_image": o.image} for o in self.subjects])
        dim = len(grid.shape)
        matrices = [np.eye(dim + 1) for _ in self.subjects]
        if self.over_time is not None:  # frames share one space, and their grid stays
            shape, frame = images.header(self.subjects[0].image)
            return Stage(
                "frames", matrices, Space(grid.shape, images.to_grid(Image(np.empty(shape, bool), frame), grid))
            )
        if stage != "none":
            for matrix, one in zip(matrices, self.subjects, strict=True):
                matrix[:-1, -1] = _middle(one)
        signs = [-1, -1] if dim == 2 else [1, 1, 1]  # the closest to RAS; pictures: LPS
        space = Space(grid.shape, np.diag([*np.multiply(signs, grid.spacing), 1.0]))
        matrices = without_mean(matrices)
        return Stage("middles", matrices, self._around(space, matrices))

    def _around(self, space: Space, matrices: Sequence[np.ndarray]) -> Space:
        """The grid around the mean of the subjects' middles."""
        pairs = zip(matrices, self.subjects, strict=True)
        middle = np.mean([apply_affine(np.linalg.inv(matrix), _middle(one)) for matrix, one in pairs], axis=0)
        placed = space.affine.copy()
        placed[:-1, -1] = middle - placed[:-1, :-1] @ (np.array(space.shape) - 1) / 2
        return Space(space.shape, placed)

    def _aligned(self, last: Stage, tag: str, stage: str, metric: str, *, first: bool) -> Stage:
        film = self.over_time is not None

        def align(one: Subject) -> Arrays:
            files, mean = Source(), images.read_image(self.file(last, "mean"))
            about: dict[str, Any] = {
                "moving_mask": counted(one.as_moving(), "moving", files),
                "start": None if first and not film else self.matrix(one, last),
            }
            found = affine.align(mean, files.image(one.image), stage, metric=metric, **about)
            return {"matrix": found.matrix}

        self.phases.each(tag, align)
        found = [self.phases.read(tag, one)["matrix"] for one in self.subjects]
        matrices = without_mean(found if self.over_time is None else along_time(found, self.over_time))
        return Stage(tag, matrices, self._around(last.space, matrices))

    def _refined(self, last: Stage, i: int) -> Stage:
        def find(one: Subject) -> Arrays:
            batch = collate_pairs([self.load(self.case(one, last), Source())])
            pair, _, _, told = prepare_batch(batch, distributed.device())
            known = self.field(one, last)
            found = self.velocity(pair, None if known is None else known.to(pair), told["masks"])
            shape = coarser_shape(pair.shape[2:], VELOCITY_STRIDE)
            return {"velocity": resize(found, shape)[0].cpu().numpy()}

        self.phases.each(f"round {i}", find)

        def mean() -> Arrays:  # of a film too: what is spread over time keeps its sum
            each = (self.phases.read(f"round {i}", one)["velocity"] for one in self.subjects)
            total = sum(each, np.zeros(()))  # in double precision
            return {"velocity": (total / len(self.subjects)).astype(np.float32)}

        self.phases.once(f"mean velocity {i}", mean)
        return last._replace(tag=f"round {i}", round=i)

    def _mean(self, stage: Stage) -> Mean:
        """The mean image of a stage; its files are those that the next stage registers to."""
        name, seen = f"mean of {stage.tag}", f"seen in {stage.tag}"
        if not (self.work / f"{name}.npz").is_file():
            self.phases.each(seen, lambda one: self._seen(one, stage))
        kept = self.phases.once(name, lambda: self._meaned(stage, seen))
        mean = Mean(kept["image"], kept["covered"])
        about: dict[str, float | str] = {"stage": stage.tag}
        about["sharpness"] = sharpness(mean.image, voxel_size(stage.space.affine).tolist())
        if stage.round:
            u = self.phases.read(f"mean velocity {stage.round}")["velocity"]
            size = VELOCITY_STRIDE * voxel_size(stage.space.affine).reshape(-1, *[1] * (u.ndim - 1))
            about["mean_velocity_mm"] = float(np.linalg.norm(u * size, axis=0).mean())
        self.told.append(about)
        return mean

    def _meaned(self, stage: Stage, seen: str) -> Arrays:
        parts = (self.phases.read(seen, one) for one in self.subjects)
        mean = mean_image((part["image"], part["covered"]) for part in parts)
        if not (mean.covered >= INSIDE).any():
            raise InputError("the subjects share no place; take --affine affine, or centre")
        for name, array in (("mean", mean.image), ("inside", (mean.covered >= INSIDE).astype(np.int32))):
            displacement.write_image(self.file(stage, name), array, stage.space.affine)
        shutil.rmtree(self.work / seen)
        return mean._asdict()

    def _seen(self, one: Subject, stage: Stage) -> Arrays:
        """A subject's own voxels on the template's grid, resampled once, and where it has any."""
        frame, shape = stage.space.affine, stage.space.shape
        velocity = self.field(one, stage)
        u = np.zeros((len(shape), *shape))
        if velocity is not None:
            u = repair(resize(integrate(velocity), shape)).displacement[0].numpy()
        grid = Image(np.empty(shape, bool), frame)
        d = displacement.native_displacement(u, frame, self.matrix(one, stage) @ frame, grid)
        parts = [_pulled(scan, d, frame) for scan in one.images()]
        return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}

    # ------------------------------------------------------------------------------------ a subject

    def matrix(self, one: Subject, stage: Stage) -> np.ndarray:
        """A_i of a subject."""
        return stage.matrices[self.subjects.index(one)]

    def field(self, one: Subject, stage: Stage) -> Tensor | None:
        """v_i (1, D, *half), voxels of its grid, without the mean of all; None before the first round."""
        if not stage.round:
            return None
        name = f"round {stage.round}"
        mean = self.phases.read(f"mean velocity {stage.round}")["velocity"]
        if self.over_time is None:
            shares = {self.subjects.index(one): 1.0}
        else:
            shares = {j: share for j, share in enumerate(self.over_time[self.subjects.index(one)]) if share}
        parts = (share * self.phases.read(name, self.subjects[j])["velocity"] for j, share in shares.items())
        return torch.from_numpy(sum(parts, -mean).astype(np.float32))[None]

    def case(self, one: Subject, stage: Stage, scan: Subject | None = None) -> Case:
        """The subject and a stage's mean as a pair of files; or its ``scan`` and the template as it is written."""
        matrix = self.work / f"matrix of {one.name}.mat"
        replace_file(matrix, affine_mat(self.matrix(one, stage)))
        fixed = self.file(stage, "mean") if scan is None else self.out / TEMPLATE
        found = {"case": (scan or one).name, "fixed_image": str(fixed), "fixed_mask": str(self.file(stage, "inside"))}
        return found | {"initial_2": str(matrix), **(scan or one).as_moving()}

    def file(self, stage: Stage, name: str) -> Path:
        """Of a stage's mean; it lies on the grid that the next stage registers on."""
        return self.work / f"{name} of {stage.tag}.nii.gz"

    def log_sums(self, stage: Stage) -> dict[str, float]:
        """How far the means of the logarithms are from zero."""
        found = {"matrices": log_sum(stage.matrices)}
        if stage.round:
            fields = (self.field(one, stage) for one in self.subjects)
            total = sum((field.double() for field in fields if field is not None), torch.zeros(()))
            found["velocities_voxels"] = float(total.abs().max() / len(self.subjects))
        return found

    def image_of(self, tag: str) -> np.ndarray:
        """The mean of a stage."""
        return self.phases.read(f"mean of {tag}")["image"]

    def write(self, stage: Stage, mean: Mean, formats: Sequence[str] = BY_DEFAULT) -> None:
        """The template, and every subject's folder, as ``regpipe register`` writes it, with it as the fixed image."""
        folder = self.out / SUBJECTS
        if not jobs.started():
            for one in self.subjects:  # what somebody removed is written again
                if not all((folder / scan.name / "metrics.json").is_file() for scan in one.images()):
                    (self.work / "written" / f"{one.name}.npz").unlink(missing_ok=True)
            if self.phases.left("written") or not (self.out / TEMPLATE).is_file():
                displacement.write_image(self.out / TEMPLATE, mean.image, stage.space.affine)

        def save(one: Subject) -> Arrays:
            velocity = self.field(one, stage)
            for scan in one.images():
                self._save(self.case(one, stage, scan), velocity, folder / scan.name, formats)
            return {"done": np.ones(1)}

        self.phases.each("written", save)

    def _save(self, case: Case, velocity: Tensor | None, folder: Path, formats: Sequence[str]) -> None:
        files = Source()
        clear(folder)
        batch = collate_pairs([self.load(case, files)])
        fixed, moving = batch["fixed_image"], batch["moving_image"]
        if velocity is None:
            velocity = fixed.new_zeros(1, fixed.ndim - 2, *coarser_shape(fixed.shape[2:], VELOCITY_STRIDE))
        prediction = without_folds(fixed, moving, register(fixed, moving, velocity))
        row, _ = save_case(case, batch, prediction, self.load, folder, files, formats=formats, settings=self.settings)
        replace_file(folder / "metrics.json", json.dumps(row, indent=1).encode())


def _pulled(scan: Subject, d: np.ndarray, frame: np.ndarray) -> Arrays:
    """An image's voxels, and where it has any, through ``d`` (D, *S) LPS mm to itself or to the mean of its subject."""
    files = Source()
    moving, there = files.image(scan.image), files.known(scan.image)  # None: everywhere
    onwards = initial.read(scan.as_moving(), len(d))
    if onwards is not None:
        d = sampled(composite(itk_field(d, frame), onwards.transform), d.shape[1:], frame)
    share = np.ones(moving.array.shape, np.float32) if there is None else there.astype(np.float32)
    view, grey = (moving._replace(array=x) for x in (share, images.normalise(moving.array) * share))
    seen = {"image": grey, "covered": view}
    return {name: displacement.resample_through(what, d, frame, order=1) for name, what in seen.items()}


def _middle(one: Subject) -> np.ndarray:
    shape, matrix = images.header(one.image)
    return np.asarray(apply_affine(matrix, (np.array(shape) - 1) / 2))
