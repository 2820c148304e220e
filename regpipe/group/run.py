"""What ``regpipe template`` does, as a function: a folder of subjects in, their template and transforms out."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regpipe.bundle.run import own
from regpipe.data import manifest
from regpipe.data.manifest import TRANSFORM, WITHIN
from regpipe.data.pairs import SIDES
from regpipe.engines import inferers, record
from regpipe.engines.refine import SHIPPED_STEPS, ZERO_STEPS, zero_refiner
from regpipe.group import film
from regpipe.group.means import Mean, Votes
from regpipe.group.phases import leave
from regpipe.group.subjects import Subject, by_subject, list_subjects
from regpipe.group.template import LABEL, PROBABILITY, SUBJECTS, TEMPLATE, WRITTEN, Group, Stage, Velocity
from regpipe.inference import jobs as processes
from regpipe.inference.by_bundle import load_network
from regpipe.inference.case_files import BY_DEFAULT
from regpipe.inference.register import bundle_named, one_pair
from regpipe.io.labels import ids_of, read_label
from regpipe.metrics.measures import dice, mean_of
from regpipe.report.pictures import contact_sheet, save_png
from regpipe.transforms import displacement
from regpipe.transforms.affine import STAGES
from regpipe.utils import console, distributed
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file, sha256

BENDING = ("similarity", "affine")  # what a subject's own images are not aligned by: that is growth


def make_template(
    dataset: str | Path,
    out: str | Path,
    *,
    bundle: str | None = None,
    rounds: int = 3,
    within: str | None = None,
    sequence: bool = False,
    over_time: float = film.OVER_TIME,
    affine: str | None = None,
    affine_metric: str = "mi",
    refine: int | None = None,
    similarity: str = "auto",
    smoothness: float = 1.0,
    finest: int | None = None,
    formats: Sequence[str] = BY_DEFAULT,
    jobs: int = 1,
) -> dict[str, Any]:
    """The template of the images of a folder or datalist, and each subject's transform to it; see ``group.template``.

    Args:
        out: gets ``template.nii.gz``, ``covered.nii.gz`` (share of the subjects at each voxel), of labels
            ``template_label.nii.gz`` and ``probability_ID.nii.gz``, ``template.json``, ``template.png``,
            ``manifest.json``, a case's folder for each subject in ``subjects``, and ``rounds``, from which the same
            call goes on.
        bundle: as ``register_files``': whose network the first round begins with; ``none``: from zero.
        rounds: of deformation; 0: an affine template.
        within: subjects of several images: each one's own mean comes first, in ``within``; see ``subjects.by_subject``.
        sequence: ``dataset`` is a film, or its frames in natural order: see ``group.film``.
        over_time: of a film, see ``group.film.shares``.
        affine, affine_metric: see ``transforms.affine``; by default ``affine``, of a film ``none``. A subject's own
            images are not aligned further than ``rigid``.
        refine: steps of each subject's first round; None: as of ``regpipe register``. Later rounds go on with
            ``SHIPPED_STEPS``.
        similarity, smoothness, finest: see ``engines.refine``.
        jobs: processes, each of the command that this one was started as: see ``inference.jobs``.

    Returns:
        What ``template.json`` holds.

    Raises:
        InputError: what a user can mend; what was finished is kept, and the same call goes on.
    """
    affine = affine or ("none" if sequence else "affine")
    _check(affine, rounds, within, sequence=sequence, over_time=over_time)
    subjects, out = list_subjects(dataset, film=sequence), Path(out)
    loss: dict[str, Any] = {"similarity": similarity, "smoothness": smoothness}
    velocity, model = _velocity(bundle, subjects, refine=refine, finest=finest, **loss)
    settings = {"affine": affine, "affine_metric": affine_metric, "rounds": rounds, "refine": refine, "finest": finest}
    settings |= {**loss, "model": model, "formats": sorted(formats)}
    shares = film.shares(len(subjects), over_time) if sequence else None
    settings |= {"over_time": over_time} if sequence else {}
    build = _Build(velocity, settings, jobs)
    try:
        if within is not None:
            groups = by_subject(subjects, within, dataset)
            subjects = [build.own_mean(name, scans, out / WITHIN / name) for name, scans in groups.items()]
            subjects.sort(key=lambda one: (one.sha256, one.name))
        about, _ = build.template(subjects, out, over_time=shares)
        leave()
        return about
    except KeyboardInterrupt:
        console.say("\nstopped: the same command goes on with what is left")
        raise SystemExit(130) from None


def _check(affine: str, rounds: int, within: str | None, *, sequence: bool, over_time: float) -> None:
    if affine not in STAGES:
        raise InputError(f"--affine {affine}: of a template choose among {', '.join(STAGES)}")
    if rounds < 0:
        raise InputError(f"--rounds {rounds}: give 0, for an affine template, or more")
    if sequence and within is not None:
        raise InputError("--within and --sequence: a film is of one subject; make each one's mean by itself")
    if not 0 <= over_time < math.inf:
        raise InputError(f"--over-time {over_time:g}: give a number of frames; 0: each frame by itself")


class _Build(NamedTuple):
    """How templates are made."""

    velocity: Velocity
    settings: dict[str, Any]
    jobs: int

    def template(
        self, subjects: Sequence[Subject], out: Path, *, over_time: np.ndarray | None = None
    ) -> tuple[dict[str, Any], Path]:
        """What ``template.json`` holds, and the file of where the template counts."""
        told: dict[str, Any] = {"settings": self.settings, "velocity": self.velocity, "processes": self.jobs}
        group = Group(subjects, out, over_time=over_time, **told)
        last, mean = group.run(self.settings["affine"], self.settings["affine_metric"], self.settings["rounds"])
        group.write(last, mean, self.settings["formats"])
        inside = group.file(last, "inside")
        if processes.started():  # it came for another subject's mean
            return {}, inside
        return _finish(group, last, mean, self.settings), inside

    def own_mean(self, name: str, scans: Sequence[Subject], out: Path) -> Subject:
        """A subject by its images: their mean, which is a template of its own in a folder."""
        if len(scans) == 1:
            return scans[0]._replace(name=name, scans=(scans[0],))
        affine, formats = self.settings["affine"], {*self.settings["formats"], "itk"}
        own = {"affine": "rigid" if affine in BENDING else affine, "formats": sorted(formats)}
        console.say(f"{name}: the mean of {len(scans)} images")
        _, inside = self._replace(settings=self.settings | own).template(scans, out)
        beside = {"label": str(out / LABEL)} if (out / LABEL).is_file() else {}
        ways = [str(out / SUBJECTS / scan.name / TRANSFORM) for scan in scans]
        found = tuple(scan._replace(to_mean=way) for scan, way in zip(scans, ways, strict=True))
        template = out / TEMPLATE
        return Subject(name, str(template), sha256([template]), {**beside, "mask": str(inside)}, scans=found)


def _velocity(
    bundle: str | None, subjects: Sequence[Subject], *, refine: int | None, **asked: Any
) -> tuple[Velocity, list[dict[str, str]]]:
    """How a round finds a subject's velocity, and the files of the network that helps it."""
    further = zero_refiner(steps=SHIPPED_STEPS, **asked)
    with tempfile.TemporaryDirectory() as aside:  # two of the images tell what there is to register
        sides = {f"{side}_image": Path(one.image) for side, one in zip(SIDES, subjects, strict=False)}
        dataset = one_pair(Path(aside) / "pair.json", sides)
        found = bundle_named(bundle, dataset)
        known = None if found is None else own(found[0])
        folder = "" if known is None else inferers.model_folder(str(known[0] / "models"), str(dataset))
    if found is None:
        network, first = None, zero_refiner(steps=ZERO_STEPS if refine is None else refine, **asked)
        model: list[dict[str, str]] = []
    else:
        if known is None:
            raise InputError(f"{found[0]}: a template takes a bundle whose configuration is regpipe's own, or none")
        network, cascades = load_network(folder, known[1]).eval(), record.read(folder)["cascades"]
        refiner = zero_refiner(steps=SHIPPED_STEPS if refine is None else refine, **asked)
        inferer = inferers.RegistrationInferer(cascades=cascades, refiner=refiner)
        model = manifest.bundle_files(Path(folder))

    @torch.no_grad()
    def velocity(pair: Tensor, known: Tensor | None, masks: Sequence[Tensor]) -> Tensor:
        fixed, moving = pair.float().chunk(2, dim=1)
        if known is not None:
            return further(fixed, moving, known, masks=masks)
        if network is None:
            return first(fixed, moving, masks=masks)
        found: Tensor = inferer(pair, network, masks=masks)["velocity"]
        return found

    return velocity, model


def _finish(group: Group, last: Stage, mean: Mean, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is made of all subjects together, and last the manifest."""
    out, subjects = group.out, group.subjects
    displacement.write_image(out / "covered.nii.gz", mean.covered, last.space.affine)
    about: dict[str, Any] = {
        "format": "regpipe template 1",
        "subjects": [subject.name for subject in subjects],
        "shape": [*last.space.shape],
        "affine": last.space.affine.tolist(),
        "stages": group.told,
        "log_sums": group.log_sums(last),
        "labels": _vote(out, subjects, last.space.affine),
    }
    about |= {} if group.over_time is None else {"film": film.write_film(out, subjects)}
    replace_file(out / "template.json", f"{json.dumps(about, indent=1)}\n".encode())
    shown = [(str(told["stage"]), group.image_of(str(told["stage"]))) for told in group.told]
    save_png(out / "template.png", contact_sheet([_picture(image) for _, image in shown], [tag for tag, _ in shown]))
    images = [scan for one in subjects for scan in one.images()]
    inputs = [item for one in images for role, path in one.files().items() for item in manifest.sources(role, [path])]
    files = manifest.hashes(out, [*WRITTEN, f"{SUBJECTS}/*/**/*"])
    device = manifest.machine(distributed.device())
    manifest.write(
        out, "template", inputs=inputs, files=files, settings=dict(settings), seed=manifest.SEED, machine=device
    )
    return about


def _vote(out: Path, subjects: Sequence[Subject], affine: np.ndarray) -> dict[str, float]:
    """The label map that the subjects vote for; label -> mean Dice of it and each subject's own."""
    labelled = [[scan for scan in one.images() if scan.label is not None] for one in subjects]
    voters = [(scan, 1 / len(scans)) for scans in labelled for scan in scans]
    if not voters:
        return {}

    def maps() -> Iterator[tuple[np.ndarray, float]]:
        for one, share in voters:
            yield read_label(out / SUBJECTS / one.name / "warped_label.nii.gz")[0].array, share

    votes = Votes(next(maps())[0].shape)
    for labels, share in maps():
        votes.add(labels, share)
    won = ids_of(votes.won(), LABEL)
    displacement.write_image(out / LABEL, won, affine)
    known = [label for label in sorted(votes.counts) if label]
    for label in known:
        displacement.write_image(out / PROBABILITY.format(label), votes.probability(label), affine)
    alike = [dice(won, labels, known) for labels, _ in maps()]
    return {str(label): mean_of(one[label] for one in alike) for label in known}


def _picture(image: np.ndarray) -> np.ndarray:
    """The middle planes of an image beside each other, upright, as (H, W, 3) uint8."""
    if image.ndim == 2:
        planes = [image.T]
    else:
        planes = [np.take(image, n // 2, axis).T[::-1] for axis, n in enumerate(image.shape)]
    high = max(plane.shape[0] for plane in planes)
    grey = np.hstack([np.pad(plane, ((0, high - plane.shape[0]), (0, 0))) for plane in planes])
    scaled = np.clip(255 * grey / max(float(grey.max()), 1e-6), 0, 255).astype(np.uint8)
    return np.repeat(scaled[..., None], 3, axis=-1)
