"""Random pairs made on the fly: their truth, their seeds, and that a training by the overlay learns and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from helpers.places import ROOT
from helpers.training import Trained, assert_same, kill_at, train
from regpipe.bundle.write import write_bundle
from regpipe.data.load import LoadPair
from regpipe.data.pairs import list_pairs
from regpipe.engines.inferers import RegistrationInferer
from regpipe.engines.readout import Readout
from regpipe.fields.algebra import compose, identity_grid, jacobian_determinant, warp
from regpipe.networks.symmetric import SymmetricNet
from regpipe.phantoms import synthetic
from regpipe.phantoms.cohort import write_cohort
from regpipe.phantoms.synthetic import Batches, make_batch
from regpipe.utils.errors import InputError

pytestmark = pytest.mark.usefixtures("restored")

SHAPES = [(64, 50), (33, 40, 28)]
EACH = pytest.mark.parametrize("shape", SHAPES)


def batch_of(shape: tuple[int, ...], seed: int = 0, size: int = 8) -> dict[str, Any]:
    return make_batch(shape, size, generator=torch.Generator().manual_seed(seed))


def inner(x: torch.Tensor, rim: int = 8) -> torch.Tensor:
    """Without the rim, whose voxels the other image may not hold."""
    for axis in range(2, x.ndim):
        x = x.narrow(axis, rim, x.shape[axis] - 2 * rim)
    return x


@EACH
def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(shape) -> None:
    first, again, other = batch_of(shape), batch_of(shape), batch_of(shape, seed=1)
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        if name != "case":
            assert torch.equal(tensor, again[name])
            assert name.endswith("mask") or not torch.equal(tensor, other[name])


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair is one scene, warped."""
    monkeypatch.setattr(synthetic, "UNLIKE", 0.0)


@EACH
def test_most_pairs_differ_by_more_than_a_warp(shape, monkeypatch) -> None:
    def unlike() -> float:
        batch = batch_of(shape)
        warped = warp(batch["moving_label"].float(), batch["displacement"], mode="nearest")
        return float((inner(warped) != inner(batch["fixed_label"])).float().mean())

    before = unlike()
    monkeypatch.setattr(synthetic, "UNLIKE", 0.0)
    assert unlike() < 0.5 * before < 0.25


@EACH
def test_clean_images_have_one_contrast_and_no_noise(shape, alike) -> None:
    batch = batch_of(shape)
    warped = warp(batch["moving_clean"], batch["displacement"])
    assert float((inner(warped) - inner(batch["fixed_clean"])).abs().mean()) < 0.02
    assert batch["fixed_clean"].min() >= 0 and batch["fixed_clean"].max() <= 1


@EACH
def test_the_displacement_brings_the_moving_label_onto_the_fixed_one_and_the_inverse_back(shape, alike) -> None:
    batch = batch_of(shape, size=12)
    for u, start, end in (("displacement", "moving", "fixed"), ("inverse", "fixed", "moving")):
        warped = warp(batch[f"{start}_label"].float(), batch[u], mode="nearest")
        same = (inner(warped) == inner(batch[f"{end}_label"])).float().mean()
        still = (inner(batch[f"{start}_label"]) == inner(batch[f"{end}_label"])).float().mean()
        assert 1 - same < 0.4 * (1 - still)  # borders fall between voxels


@EACH
def test_the_two_displacements_are_inverse_and_do_not_fold(shape) -> None:
    batch = batch_of(shape)
    u, back = batch["displacement"], batch["inverse"]
    assert jacobian_determinant(u).min() > 0 and jacobian_determinant(back).min() > 0
    small = u.flatten(1).abs().amax(1) < 6  # the others leave the grid
    assert small.any()
    left = inner(compose(u, back)[small]).square().sum(1).sqrt()
    assert left.mean() < 0.05 and left.max() < 1


def test_pairs_are_made_for_networks() -> None:
    batch = batch_of((48, 64), size=40)
    for side in ("fixed", "moving"):
        image, mask, label = (batch[f"{side}_{kind}"] for kind in ("image", "mask", "label"))
        assert image.shape == mask.shape == label.shape == (40, 1, 48, 64)
        assert image.dtype == mask.dtype == torch.float32 and label.dtype == torch.int32
        assert image.min() >= 0 and image.max() <= 1 and bool(image.isfinite().all())
        assert set(mask.unique().tolist()) == {0.0, 1.0} and mask.mean() > 0.8
        assert (image.flatten(1).std(1) > 0.02).all()  # there is something to see
    lengths = batch["displacement"].square().sum(1).sqrt().flatten(1).amax(1)
    assert lengths.min() < 1 and 6 < lengths.max() < 32  # nearly none, and a good part of the side


def test_pairs_of_one_contrast_look_alike_where_they_are_aligned(alike) -> None:
    def likeness(share: float) -> float:
        batch = make_batch((64, 64), 24, generator=torch.Generator().manual_seed(0), same_contrast=share)
        warped = warp(batch["moving_image"], batch["displacement"])
        both = torch.stack([warped.flatten(1), batch["fixed_image"].flatten(1)], 1)
        return float(torch.stack([torch.corrcoef(pair)[0, 1] for pair in both]).mean())

    assert likeness(1.0) > likeness(0.0) + 0.25


def test_a_pair_on_disk_is_one_in_memory(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "pairs", kind="synthetic", shape=(48, 40), n_pairs=2)
    item = LoadPair(None)(list_pairs(folder)[1])
    made = synthetic.make_phantom((48, 40), seed=(0, 1))
    torch.testing.assert_close(item["displacement"], torch.from_numpy(made.displacement), atol=1e-4, rtol=0)
    assert torch.equal(item["fixed_label"][0].int(), torch.from_numpy(made.fixed_label).int())
    p, q = item["fixed_landmarks"], item["moving_landmarks"]
    assert len(p) == len(q) > 10 and float((p - q).abs().max()) > 0.3


def test_a_phantom_of_this_kind_takes_no_motion_and_unknown_kinds_are_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave --motion out"):
        write_cohort(tmp_path / "a", kind="synthetic", motion=3.0)
    with pytest.raises(ValueError, match="ultrasound, mr, synthetic"):
        write_cohort(tmp_path / "b", kind="nothing")


@pytest.mark.parametrize("dim", [2, 3])
def test_an_epoch_has_grids_of_many_sizes_drawn_from_torch(dim: int) -> None:
    low, high = synthetic.SIDE_LENGTHS[dim]
    batches = Batches(dim, batches=3)
    torch.manual_seed(0)
    drawn = [batches[i] for i in range(3)]
    shapes = [tuple(batch["fixed_image"].shape[2:]) for batch in drawn]
    assert len(set(shapes)) > 1 and all(low <= n <= high for shape in shapes for n in shape)
    torch.manual_seed(0)
    assert torch.equal(batches[0]["moving_image"], drawn[0]["moving_image"])
    with pytest.raises(IndexError):
        batches[3]


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="2D or 3D"):
        Batches(4, batches=1)
    with pytest.raises(InputError, match="give 1 or more"):
        Batches(2, batches=0)


def test_contrasts_are_alike_at_first() -> None:
    batches = Batches(2, batches=1)
    engine = Engine(lambda *_: None)
    synthetic.LikeFirst(batches, 2).attach(engine)
    seen: list[float] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(batches.same_contrast))
    engine.run([0], max_epochs=4)
    assert seen == [1.0, 0.5, synthetic.SAME_CONTRAST, synthetic.SAME_CONTRAST]


OVERLAY = ROOT / "configs" / "synthetic.yaml"


def test_a_training_by_the_overlay_goes_on_from_a_kill_as_if_there_had_been_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "SIDE_LENGTHS", {2: (32, 64)})
    monkeypatch.setattr(synthetic, "VALIDATED", {2: (32, 32)})
    told: dict[str, Any] = {"overlays": [OVERLAY], "held_apart": 2, "pairs_per_epoch": 4, "batch_size": 2}
    told |= {"holdout": 2, "like_first": 2, "val_interval": 1, "average": 2, "device": "$torch.device('cpu')"}
    told["readout"] = {"apart": "$@dataset_dir"}
    whole = train(write_bundle("alexnet", tmp_path / "whole"), None, 3, **told)
    assert len({loss for *_, loss in whole.curve}) == 6  # never the same pairs again
    bundle, found = write_bundle("alexnet", tmp_path / "bundle"), Trained()
    with pytest.raises(RuntimeError):
        train(bundle, None, 3, stop=kill_at(4), into=found, **told)
    found.curve = found.curve[:2]
    assert_same(train(bundle, None, 3, into=found, **told), whole)


def test_curves_on_other_data_are_drawn_and_choose_nothing(tmp_path, cohort) -> None:
    class Written(dict):
        def add_scalar(self, name: str, value: float, step: int) -> None:
            self[name, step] = value

    evaluator = Engine(lambda *_: None)
    evaluator.network, evaluator.inferer = SymmetricNet(2, "alexnet"), RegistrationInferer()  # type: ignore[attr-defined]
    evaluator.state.device = torch.device("cpu")  # type: ignore[attr-defined]  # as MONAI's
    trainer, written = Engine(lambda *_: None), Written()
    Readout({"phantoms": str(cohort)}, evaluator=evaluator, writer=written, pairs=2, every=2).attach(trainer)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    trainer.run([0], max_epochs=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert {step for _, step in written} == {2, 4}
    assert written["readout/phantoms/dice", 2] == pytest.approx(written["readout/phantoms/dice_before", 2], abs=0.02)


def test_labels_in_3d_are_those_of_the_heights_at_every_voxel() -> None:
    """They are interpolated from every second one: outlines and rims of a body must not become stairs."""
    wrong = []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        scene = synthetic.draw_scene((40, 40, 40), torch.ones(3), generator=g)
        grid = identity_grid((40, 40, 40))
        exact = synthetic._highest(scene.heights(grid))
        wrong.append(float((synthetic.label_map(scene, grid) != exact).float().mean()))
    assert max(wrong) < 0.03 and sum(wrong) / 6 < 0.015
