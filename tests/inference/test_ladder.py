"""What is given up where memory is short, in which order; and that a lack of memory ends in a line."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regpipe.transforms.apply as carrying
from helpers.bundles import Command, deforming_bundle, infer, train
from regpipe.bundle.write import write_bundle
from regpipe.engines.inferers import RegistrationInferer, ZeroInferer
from regpipe.engines.refine import make_refiner, refinement_loss, zero_refiner
from regpipe.inference import ladder, memory
from regpipe.inference.ladder import FittingInferer, HalfPrecision, Tiled
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils import machine
from regpipe.utils.errors import InputError, explain, out_of_memory

ALLOCATION = (
    "[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 b"
)


@pytest.fixture(scope="module")
def network() -> SymmetricNet:
    torch.manual_seed(0)
    net = SymmetricNet(2, "plain").eval()
    for level in net.levels:
        level.flow.weight.data *= 300  # type: ignore[union-attr, operator]
    return net


def smooth_pair(shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 2, *(n // 8 for n in shape), generator=generator)
    return torch.nn.functional.interpolate(coarse, size=shape, mode="bicubic").clamp(0, 1)


# -------------------------------------------------------------------------------------------------- tiles


@torch.no_grad()
def test_a_tile_as_large_as_the_grid_is_the_network_itself(network: SymmetricNet) -> None:
    pair = smooth_pair((60, 50))
    assert torch.allclose(Tiled(network, 65)(pair).velocity, network(pair), atol=1e-5)


@torch.no_grad()
def test_swapping_the_images_flips_the_sign_of_the_tiles_velocity_bit_for_bit(network: SymmetricNet) -> None:
    tiled, pair = Tiled(network, 65), smooth_pair((120, 100))
    velocity = tiled(pair).velocity
    assert velocity.shape == network(pair).shape and velocity.abs().max() > 0.1
    assert torch.equal(tiled(pair.flip(1)).velocity, -velocity)


@torch.no_grad()
def test_tiles_lie_on_the_wholes_grid() -> None:
    class Shift(torch.nn.Module):
        """A velocity that tells where the tile was: half of the voxel's own coordinate, read off the images."""

        inner_shape = SymmetricNet(2, "plain").inner_shape

        def forward(self, pair: torch.Tensor) -> torch.Tensor:
            return pair[..., ::2, ::2] / 2

    rows, columns = torch.meshgrid(torch.arange(129.0), torch.arange(97.0), indexing="ij")
    found = Tiled(Shift(), 65)(torch.stack([rows, columns])[None])
    truth = torch.meshgrid(torch.arange(65.0), torch.arange(49.0), indexing="ij")
    assert torch.allclose(found.velocity[0], torch.stack(truth), atol=1e-4)


def test_tiles_take_less_memory_than_the_whole() -> None:
    net, inferer = SymmetricNet(3, "plain"), RegistrationInferer()
    whole, tiled = (memory.inference(inferer, x, (192, 192, 192)) for x in (net, Tiled(net, 65)))
    assert tiled < 0.8 * whole


@torch.no_grad()
def test_a_velocity_in_bfloat16_is_near_that_in_float32(network: SymmetricNet) -> None:
    pair = smooth_pair((64, 48))
    half, whole = HalfPrecision(network)(pair).velocity, network(pair)
    assert half.dtype == torch.float32
    assert (half - whole).abs().mean() < 0.1 * whole.abs().mean()


# ------------------------------------------------------------------------------------------------- ladder


SHAPE = (96, 80)


def predicted(inferer: Any, network: Any, shape: object, **_: object) -> int:
    """A machine in small: refinement costs 100, less where it is coarser; the network 80, in bfloat16 50, tiled 20."""
    refinement = 100 // (inferer.refiner.finest or 1) if inferer.refiner else 0
    half, tiled = (isinstance(network, kind) for kind in (HalfPrecision, Tiled))
    return max(refinement, 20 if tiled else 50 if half else 80)


@pytest.fixture
def asked() -> RegistrationInferer:
    return RegistrationInferer(refiner=make_refiner(2, refinement_loss("lncc")))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how much is free on that machine, in its unit."""
    monkeypatch.setattr(memory, "inference", predicted)
    monkeypatch.setattr(ladder, "PLENTY", 1 << 40)  # nothing is small
    monkeypatch.setattr(ladder, "TILES", (65,))
    return lambda room: monkeypatch.setattr(machine, "room", lambda *_: room)


@pytest.mark.parametrize(
    ("room", "amx", "told"),
    [
        (100, False, []),
        (80, False, ["every 2 voxels"]),
        (80, True, ["every 2 voxels"]),  # bfloat16 came before it, and then is not needed
        (50, True, ["bfloat16", "every 2 voxels"]),
        (50, False, ["every 2 voxels", "on tiles of 65"]),
    ],
)
def test_the_rungs_are_taken_in_order_until_it_fits_and_each_is_said(
    asked: RegistrationInferer,
    network: SymmetricNet,
    short: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: int,
    amx: bool,
    told: list[str],
) -> None:
    monkeypatch.setattr(ladder, "has_bfloat16", lambda _: amx)
    short(room)
    found = FittingInferer(asked)(smooth_pair(SHAPE), network)
    assert found["displacement"].shape == (1, 2, *SHAPE)
    assert len(caplog.records) == len(told)
    for record, words in zip(caplog.records, told, strict=True):
        assert record.levelno == logging.WARNING and words in record.message and "grid 96x80" in record.message
    assert [words in step for words, step in zip(told, found["to_fit_memory"], strict=True)] == [True] * len(told)
    assert asked.refiner is not None and asked.refiner.finest == 1  # what was asked for is as it was


def test_where_it_fits_the_answer_is_the_same(
    asked: RegistrationInferer, network: SymmetricNet, short: Callable[[int], None]
) -> None:
    short(1000)
    pair = smooth_pair(SHAPE)
    assert torch.equal(FittingInferer(asked)(pair, network)["velocity"], asked(pair, network)["velocity"])


def test_where_nothing_fits_the_error_says_what_to_do(
    asked: RegistrationInferer, network: SymmetricNet, short: Callable[[int], None]
) -> None:
    short(10)
    with pytest.raises(InputError, match="grid of 96x80 needs .* GiB at least, .* free: .*--memory_gib"):
        FittingInferer(asked)(smooth_pair(SHAPE), network)


def test_memory_that_is_short_for_a_while_is_spared_for_that_while(
    asked: RegistrationInferer,
    network: SymmetricNet,
    short: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ladder, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(machine, "held", lambda: 7)
    short(100)
    fitting, pair, taken = FittingInferer(asked), smooth_pair(SHAPE), []
    for free in (1000, 80, 80, 1000):
        monkeypatch.setattr(machine, "free", lambda *_, free=free: free)
        taken.append(fitting(pair, network)["to_fit_memory"])
    assert taken == [[], ["refinement at images every 2 voxels"], ["refinement at images every 2 voxels"], []]
    assert len(caplog.records) == 1  # not once a case
    monkeypatch.setattr(machine, "held", lambda: 27)
    monkeypatch.setattr(machine, "free", lambda *_: 80)  # and 20 that the cases before left behind
    assert fitting(pair, network)["to_fit_memory"] == []


def test_what_was_given_up_stands_in_the_cases_files_and_in_the_summary(
    tmp_path: Path,
    cohort: Path,
    monai_bundle: Command,
    short: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reusable: list[int] = []
    monkeypatch.setattr(
        "regpipe.inference.folder.require_for_files", lambda *_, **told: reusable.append(told["reusable"])
    )
    monkeypatch.setattr(machine, "held", itertools.count(0, 10).__next__)  # a process that keeps what it is given
    monkeypatch.setattr(memory, "inference", lambda _, network, *__, **___: 20 if isinstance(network, Tiled) else 80)
    monkeypatch.setattr(ladder, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(ladder, "TILES", (17,))
    bundle = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)), backbone="plain")
    for room, steps in ((50, ["the network on tiles of 17 voxels"]), (100, None)):
        short(room)
        out = tmp_path / str(room)
        infer(monai_bundle, bundle, cohort, out, "--formats", "[itk]")
        kept = json.loads((out / "case_000" / "metrics.json").read_text())
        settings = json.loads((out / "case_000" / "transform.json").read_text())["settings"]
        assert kept.get("to_fit_memory") == settings.get("to_fit_memory") == steps
        told = "5 of them not as asked for, to fit into memory: the network on tiles of 17 voxels"
        assert (told in capsys.readouterr().out) == (steps is not None)
        assert len(read_rows(out / "metrics.csv")) == 5  # numbers only
    assert len(reusable) == 10 and min(reusable) > 0
    infer(monai_bundle, bundle, cohort, tmp_path / "50", "--formats", "[itk]")
    assert "5 of 5 cases are finished already" in capsys.readouterr().out  # they are not done anew for that


def test_from_zero_the_images_get_coarser_twice(
    short: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "inference", lambda inferer, *_, **__: 100 // (inferer.refiner.finest or 1))
    short(25)
    FittingInferer(ZeroInferer(zero_refiner(steps=4)))(smooth_pair(SHAPE), torch.nn.Identity())
    assert ["every 4 voxels" in record.message for record in caplog.records] == [True]


def test_refinement_at_coarser_images_is_predicted_to_need_less() -> None:
    inferer, network = ZeroInferer(zero_refiner(steps=4)), torch.nn.Identity()
    needed = [memory.inference(*ladder._coarser(k)(inferer, network), (64, 64, 64)) for k in (1, 2)]
    assert needed[1] < needed[0]


def test_files_that_do_not_fit_are_refused_by_the_images_name(monkeypatch: pytest.MonkeyPatch, cohort: Path) -> None:
    image = str(cohort / "fixed_images" / "case_000.nii.gz")
    ladder.require_for_files(image, (32, 32), (30, 30))
    monkeypatch.setattr(machine, "free", lambda *_: 1000)
    ladder.require_for_files(image, (32, 32), (30, 30), reusable=memory.native((32, 32)) - 1000)
    with pytest.raises(InputError, match="case_000.nii.gz: writing files on 32x32 voxels needs"):
        ladder.require_for_files(image, (30, 30), (32, 32))


# ---------------------------------------------------------------------------------------- out of memory


def of_numpy() -> MemoryError:
    with pytest.raises(MemoryError) as found:
        np.empty(1 << 60, np.uint8)
    return found.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        of_numpy(),
        RuntimeError(ALLOCATION),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("Failed to allocate memory for image."),
    ],
)
def test_every_librarys_lack_of_memory_is_known(error: BaseException) -> None:
    wrapped = RuntimeError("applying transform")
    wrapped.__cause__ = error
    assert out_of_memory(error) and (explain(wrapped) or "").startswith("out of memory: ")
    assert not out_of_memory(RuntimeError("the size of tensor a (3) must match the size of tensor b (4)"))


@pytest.mark.parametrize("where", ["registered", "written"])
def test_a_case_that_runs_out_of_memory_fails_in_a_line_and_the_others_go_on(
    where: str,
    tmp_path: Path,
    cohort: Path,
    monai_bundle: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle, calls = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)), backbone="plain"), [0]
    target = {
        "registered": "regpipe.engines.inferers.register",
        "written": "regpipe.transforms.displacement.native_displacement",
    }[where]
    module, name = target.rsplit(".", 1)
    original = getattr(__import__(module, fromlist=[name]), name)

    def first_fails(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError(ALLOCATION) if where == "registered" else MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(target, first_fails)
    with pytest.raises(SystemExit) as end:
        infer(monai_bundle, bundle, cohort, tmp_path / "out")
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert f"case_000: cannot be {where} (out of memory: " in shown and "Traceback" not in shown
    assert [row["case"] for row in read_rows(tmp_path / "out" / "metrics.csv")] == [f"case_00{i}" for i in (1, 2, 3, 4)]


def test_training_that_runs_out_of_memory_ends_in_a_line(
    tmp_path: Path, cohort: Path, monai_bundle: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*args: object) -> None:
        raise RuntimeError(ALLOCATION)

    monkeypatch.setattr(SymmetricNet, "forward", none_left)
    with pytest.raises(Exception) as end:  # noqa: PT011  MONAI wraps it
        train(monai_bundle, write_bundle("plain", tmp_path / "bundle"), cohort)
    told = explain(end.value) or ""
    assert told.startswith("out of memory in epoch 1: take --amp true") and "\n" not in told


def test_files_that_cannot_be_carried_for_lack_of_memory_are_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def carry(path: Path, *_: object) -> str:
        if path.stem == "large":
            raise MemoryError
        return "linear"

    carrier = carrying._Carrier(None, None, None, None, "linear", None)
    monkeypatch.setattr(carrying, "_carrier", lambda *_: carrier)
    monkeypatch.setattr(carrying, "_carry_image", carry)
    problems: dict[str, str] = {}
    paths = [tmp_path / "large.nii", tmp_path / "small.nii"]
    written = carrying.apply("case", paths, tmp_path / "out", problems=problems)
    assert written == [tmp_path / "out" / "small.nii"]
    assert problems == {str(paths[0]): f"{paths[0]}: {carrying.NO_MEMORY}"}


def test_more_memory_than_there_is_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free", lambda *_: machine.GIB)
    asked = FittingInferer(RegistrationInferer(), memory_gib=1000)
    assert asked._room(torch.device("cpu")) > 900 * machine.GIB
    assert FittingInferer(RegistrationInferer())._room(torch.device("cpu")) <= machine.GIB
