"""Cohorts of which only some subjects have labels, landmarks or masks: listed, checked, loaded, batched, trained on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.bundles import Command, train
from helpers.folders import save, volume
from regpipe.bundle.write import write_bundle
from regpipe.data.checks import check_pairs
from regpipe.data.load import LoadPair, collate_pairs
from regpipe.data.pairs import list_pairs, working_grid
from regpipe.fields.algebra import Registration, register
from regpipe.losses.loss import RegistrationLoss
from regpipe.losses.terms import TERMS, Options, masks_of
from regpipe.phantoms.cohort import write_cohort


def still(u: Tensor) -> Registration:
    image = torch.zeros(len(u), 1, *u.shape[2:])
    return Registration(u, u, -u, image, image)


def half_labelled(root: Path) -> list[dict[str, str]]:
    """Four pairs, of which the second has neither labels nor landmarks, and the fourth those of one side only."""
    write_cohort(root, shape=(32, 32), n_pairs=4)
    for side, kind in itertools.product(("fixed", "moving"), ("labels", "landmarks")):
        for case in ("case_001", "case_003")[: 2 if side == "moving" else 1]:
            next((root / f"{side}_{kind}").glob(f"{case}.*")).unlink()
    cases = list_pairs(root)
    assert check_pairs(cases) == {}
    return cases


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_in_a_mixed_cohort_only_pairs_with_labels_and_landmarks_are_supervised(tmp_path: Path, batch_size) -> None:
    cases = half_labelled(tmp_path / "cohort")
    load = LoadPair(working_grid(cases))
    velocity = torch.zeros(1, 2, 17, 17, requires_grad=True)
    loss = RegistrationLoss({"lncc": 1, "diffusion": 1, "dice": 1, "landmarks": 1})
    seen = []
    for batch in DataLoader([load(c) for c in cases], batch_size, collate_fn=collate_pairs):  # type: ignore[arg-type]
        r = register(batch["fixed_image"], batch["moving_image"], velocity.expand(batch_size, -1, -1, -1))
        value, terms = loss.weigh(r._asdict(), batch)
        (gradient,) = torch.autograd.grad(value, velocity)
        assert gradient.isfinite().all() and gradient.any()
        seen.append((terms["dice"], terms["landmarks"]))
    supervised = [[d > 0.01 and p > 0.1, d == p == 0] for d, p in seen]
    expected = [i in (0, 2) for i in range(4)] if batch_size == 1 else [True] * (4 // batch_size)
    assert supervised == [[known, not known] for known in expected]


def test_an_unlabelled_pair_in_a_batch_does_not_dilute_the_labelled_ones(tmp_path: Path) -> None:
    cases = half_labelled(tmp_path / "cohort")
    load = LoadPair(working_grid(cases))
    u = 0.5 * torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = collate_pairs([load(cases[0])])
    for other in (cases[1], cases[3]):
        mixed = collate_pairs([load(cases[0]), load(other)])
        for name in ("dice", "landmarks"):
            both = TERMS[name].function(still(u.expand(2, -1, -1, -1)), mixed, Options())
            assert float(both) == pytest.approx(float(TERMS[name].function(still(u), alone, Options())), rel=1e-5)


def test_subjects_without_landmarks_pair_with_those_that_have_them(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "images" / f"{name}.nii.gz", volume((8, 8, 8)))
    (tmp_path / "landmarks").mkdir()
    for name in "ab":
        (tmp_path / "landmarks" / f"{name}.csv").write_text("x,y,z\n-1,-2,3\n-2,-2,1\n")
    cases = list_pairs(tmp_path)
    assert check_pairs(cases) == {}
    load = LoadPair(working_grid(cases))
    counts = {c["case"]: [len(load(c)[f"{side}_landmarks"]) for side in ("fixed", "moving")] for c in cases}
    assert {name for name, (f, m) in counts.items() if f == m == 2} == {"a_to_b", "b_to_a"}
    assert all(n == [0, 0] for name, n in counts.items() if "c" in name)


def test_only_pairs_with_a_mask_file_are_masked_and_batches_mix_them(tmp_path: Path) -> None:
    root = write_cohort(tmp_path / "cohort", shape=(32, 32), n_pairs=2)
    drawn = np.zeros((32, 32), np.uint8)
    drawn[:20] = 7
    save(root / "moving_masks" / "case_001.nii.gz", drawn, np.diag([-1.0, -1.0, 1.0, 1.0]))  # as the images
    cases = list_pairs(root)
    assert check_pairs(cases) == {} and "moving_mask" in cases[1] and "moving_mask" not in cases[0]
    load = LoadPair(working_grid(cases))
    assert masks_of(collate_pairs([load(cases[0])])) is None
    masks = masks_of(collate_pairs([load(c) for c in cases]))
    assert masks is not None
    assert [m.sum((1, 2, 3)).tolist() for m in masks] == [[1024, 1024], [1024, 20 * 32]]


def test_a_bundle_trains_on_a_mixed_cohort_in_batches(tmp_path: Path, monai_bundle: Command) -> None:
    half_labelled(tmp_path / "cohort")
    bundle = write_bundle("alexnet", tmp_path / "bundle")
    weights = "{'mind': 1, 'elastic': 1, 'dice': 1, 'landmarks': 0.1}"
    options = ("--holdout", 1, "--batch_size", 2, "--loss_weights", weights, "--max_epochs", 1)
    train(monai_bundle, bundle, tmp_path / "cohort", *options)
    assert (bundle / "models" / "model.pt").is_file()
