"""What ``regpipe template`` does, as a function: a folder of subjects in, their template and transforms out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regpipe.bundle.run import own
from regpipe.data import manifest
from regpipe.engines import inferers, record
from regpipe.engines.refine import SHIPPED_STEPS, ZERO_STEPS, zero_refiner
from regpipe.group.means import Mean, Votes
from regpipe.group.subjects import Subject, list_subjects
from regpipe.group.template import LABEL, PROBABILITY, SUBJECTS, WRITTEN, Group, Stage, Velocity
from regpipe.inference.by_bundle import load_network
from regpipe.inference.case_files import BY_DEFAULT
from regpipe.inference.register import bundle_named
from regpipe.io.labels import ids_of, read_label
from regpipe.metrics.measures import dice, mean_of
from regpipe.report.pictures import contact_sheet, save_png
from regpipe.transforms import displacement
from regpipe.utils import console, distributed
from regpipe.utils.errors import InputError
from regpipe.utils.files import replace_file
from regpipe.utils.settings import STAGES


def make_template(
    dataset: str | Path,
    out: str | Path,
    *,
    bundle: str | None = None,
    rounds: int = 3,
    affine: str = "affine",
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
        affine, affine_metric: see ``transforms.affine``.
        refine: steps of each subject's first round; None: as of ``regpipe register``. Later rounds go on with
            ``SHIPPED_STEPS``.
        similarity, smoothness, finest: see ``engines.refine``.
        jobs: processes, each of the command that this one was started as: see ``inference.jobs``.

    Returns:
        What ``template.json`` holds.

    Raises:
        InputError: what a user can mend; what was finished is kept, and the same call goes on.
    """
    stages = [stage for stage in STAGES if stage not in ("auto", "projective")]
    if affine not in stages:
        raise InputError(f"--affine {affine}: of a template choose among {', '.join(stages)}")
    if rounds < 0:
        raise InputError(f"--rounds {rounds}: give 0, for an affine template, or more")
    subjects, out = list_subjects(dataset), Path(out)
    asked: dict[str, Any] = {"similarity": similarity, "smoothness": smoothness, "finest": finest}
    velocity, model = _velocity(bundle, dataset, refine=refine, **asked)
    settings = {"affine": affine, "affine_metric": affine_metric, "rounds": rounds, "refine": refine, "finest": finest}
    settings |= {**asked, "model": model, "formats": sorted(formats)}
    try:
        group = Group(subjects, out, settings=settings, velocity=velocity, processes=jobs)
        last, mean = group.run(affine, affine_metric, rounds)
        group.write(last, mean, formats)
    except KeyboardInterrupt:
        console.say("\nstopped: the same command goes on with what is left")
        raise SystemExit(130) from None
    return _finish(group, last, mean, settings)


def _velocity(
    bundle: str | None, dataset: str | Path, *, refine: int | None, **asked: Any
) -> tuple[Velocity, list[dict[str, str]]]:
    """How a round finds a subject's velocity, and the files of the network that helps it."""
    further = zero_refiner(steps=SHIPPED_STEPS, **asked)
    found = bundle_named(bundle, Path(dataset))
    if found is None:
        network, first = None, zero_refiner(steps=ZERO_STEPS if refine is None else refine, **asked)
        model: list[dict[str, str]] = []
    else:
        known = own(found[0])
        if known is None:
            raise InputError(f"{found[0]}: a template takes a bundle whose configuration is regpipe's own, or none")
        folder = inferers.model_folder(str(known[0] / "models"), str(dataset))
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
    replace_file(out / "template.json", f"{json.dumps(about, indent=1)}\n".encode())
    shown = [(str(told["stage"]), group.image_of(str(told["stage"]))) for told in group.told]
    save_png(out / "template.png", contact_sheet([_picture(image) for _, image in shown], [tag for tag, _ in shown]))
    inputs = [item for one in subjects for role, path in one.files().items() for item in manifest.sources(role, [path])]
    files = manifest.hashes(out, [*WRITTEN, f"{SUBJECTS}/*/**/*"])
    device = manifest.machine(distributed.device())
    manifest.write(
        out, "template", inputs=inputs, files=files, settings=dict(settings), seed=manifest.SEED, machine=device
    )
    return about


def _vote(out: Path, subjects: Sequence[Subject], affine: np.ndarray) -> dict[str, float]:
    """The label map that the subjects vote for; label -> mean Dice of it and each subject's own."""
    voters = [one for one in subjects if one.label is not None]
    if not voters:
        return {}

    def maps() -> Iterator[np.ndarray]:
        for one in voters:
            yield read_label(out / SUBJECTS / one.name / "warped_label.nii.gz")[0].array

    votes = Votes(next(maps()).shape)
    for labels in maps():
        votes.add(labels)
    won = ids_of(votes.won(), LABEL)
    displacement.write_image(out / LABEL, won, affine)
    known = [label for label in sorted(votes.counts) if label]
    for label in known:
        displacement.write_image(out / PROBABILITY.format(label), votes.probability(label), affine)
    alike = [dice(won, labels, known) for labels in maps()]
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
