"""Memory: the count against known sizes, the prediction against a process, and what is left on a limited machine."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.places import BENCHMARKS
from regpipe.cli.main import main
from regpipe.engines.inferers import RegistrationInferer, ZeroInferer
from regpipe.engines.refine import zero_refiner
from regpipe.inference import memory
from regpipe.losses.loss import RegistrationLoss
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils import machine
from regpipe.utils.errors import InputError

BENCHMARK = BENCHMARKS / "memory.py"


def test_the_most_that_lived_at_a_time_is_counted() -> None:
    def work() -> torch.Tensor:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b.view(10, 100).t()  # a view: nothing
        return c * 2  # 8000 again

    with FakeTensorMode():
        assert memory.dry_run(work).peak == 8000


def test_what_autograd_keeps_counts_until_the_backward_is_through() -> None:
    def work() -> None:
        x = torch.zeros(1000, requires_grad=True)
        y = x.exp().exp()  # both results are kept: 12000 with x
        y.sum().backward()  # 4 for the sum and 4 for its gradient of 1; y's (a view of it); two products, x's gradient

    with FakeTensorMode():
        assert 12000 + 4000 < memory.dry_run(work).peak <= 12000 + 8000 + 8


def test_a_small_batch_is_convolved_through_a_matrix_and_a_large_one_in_blocks_of_16_channels() -> None:
    weight = torch.zeros(8, 5, 3, 3, 3)
    convolve, beside = torch.ops.aten.convolution.default, []
    for size in (10, 80):
        x, y = torch.zeros(1, 5, size, size, 4), torch.zeros(1, 8, size, size, 4)
        beside.append(memory.workspace(convolve, [x, weight, None, [1] * 3], y))
    assert beside[0] == 5 * 27 * 400 * 4
    assert beside[1] == 2 * 16 * 25600 * 4


def test_a_prediction_is_what_a_process_really_takes() -> None:
    command = [sys.executable, str(BENCHMARK), "--one", "inference", "plain", "48,64,48"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert predicted == pytest.approx(measured, rel=0.25)


def test_a_dry_run_leaves_weights_random_state_and_real_fields_alone() -> None:
    network, state = SymmetricNet(2, "plain").eval(), torch.get_rng_state()
    pair = torch.rand(1, 2, 33, 33)
    torch.set_rng_state(state)
    before = RegistrationInferer()(pair, network)["displacement"]
    small, large = (memory.inference(RegistrationInferer(), network, (n, n)) for n in (64, 256))
    assert small < large
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(RegistrationInferer()(pair, network)["displacement"], before)


def test_twice_the_voxels_take_twice_the_memory_from_zero() -> None:
    inferer, network = ZeroInferer(zero_refiner(steps=2, finest=1)), torch.nn.Identity()
    once, twice = (memory.inference(inferer, network, (n, 64, 64)) - memory.LIBRARIES for n in (64, 128))
    assert twice == pytest.approx(2 * once, rel=0.1)


def test_training_holds_gradients_and_adams_two_states_for_each_weight() -> None:
    loss = RegistrationLoss({"mse": 1.0})
    network = SymmetricNet(2, "plain")
    weights = sum(p.numel() for p in network.parameters())
    trained = memory.training(RegistrationInferer(), network, loss, (32, 32))
    network.requires_grad_(False)
    network.levels.requires_grad_(True)
    few = sum(p.numel() for p in network.levels.parameters())
    part = memory.training(RegistrationInferer(), network, loss, (32, 32))
    assert trained - part > 3 * 4 * (weights - few)


def test_what_is_chosen_by_a_mask_and_what_there_is_any_of_count_as_if_all_were_there() -> None:
    said: list[bool] = []

    def work() -> torch.Tensor:
        mask = torch.zeros(10, 10, 10) > 0  # 1000 bytes, beside zeros' 4000
        said.extend([bool(mask.any()), bool(mask.all())])
        return torch.zeros(10, 10, 10)[mask]  # 4000, 4000 more, and the 3 coordinates of 1000 places: 24000

    with FakeTensorMode():
        assert memory.dry_run(work).peak == 1000 + 4000 + 4000 + 24000
    assert said == [True, False]


SHAPE_2D = (256, 256)
VOXELS = 4 * 256 * 256  # bytes of a number a voxel
STRUCTURES = 12
ALONE = {"mse": 1.0}


def network_of(weights: dict[str, float]) -> SymmetricNet:
    return SymmetricNet(2, "plain", structures=STRUCTURES * ("anatomy" in weights))


def predicted(weights: dict[str, float]) -> float:
    """Bytes of one step of training beyond a constant."""
    ids = range(1, STRUCTURES + 1)
    loss = RegistrationLoss(weights, label_ids=tuple(ids) if "anatomy" in weights else ())
    network = network_of(weights)
    # of the device: without what the C library of the CPU keeps
    found = memory.training(RegistrationInferer(), network, loss, SHAPE_2D, label_ids=ids, device="cuda")
    return found / memory.CUDA_SLACK


def allocated(weights: dict[str, float]) -> int:
    """The most bytes that torch's allocator held at a time in one step of training on a pair, by its profiler."""
    random = torch.Generator().manual_seed(0)
    ids = tuple(range(1, STRUCTURES + 1))
    loss, network = RegistrationLoss(weights, label_ids=ids), network_of(weights)
    batch = {"displacement": torch.zeros(1, 2, *SHAPE_2D)} if "known_field" in weights else {}
    for side in ("fixed", "moving"):
        batch[f"{side}_image"] = torch.rand(1, 1, *SHAPE_2D, generator=random)
        batch[f"{side}_mask"] = (batch[f"{side}_image"] > 0.1).float()
        batch[f"{side}_label"] = torch.randint(0, STRUCTURES + 1, (1, 1, *SHAPE_2D), generator=random).int()
    before = sum(x.nbytes for x in batch.values())
    gc.collect()  # what is let go of meanwhile would count against it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = RegistrationInferer()(torch.cat([batch["fixed_image"], batch["moving_image"]], 1), network)
        loss(found, batch).mean().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return before + max(held)


@pytest.fixture(scope="module")
def alone() -> tuple[float, float]:
    return allocated(ALONE), predicted(ALONE)


@pytest.mark.parametrize(
    "weights",
    [
        {"mi": 1.0},  # of each image 32 weights a voxel, and what their exponential and quotient keep, both ways
        {**ALONE, "dice": 1.0},  # of 12 structures: both images' and both warped, one-hot
        {**ALONE, "known_field": 1.0},
        {**ALONE, "anatomy": 1.0},  # truth and logits of two images
    ],
)
def test_what_a_loss_takes_with_masks_labels_and_fields_is_what_torch_allocates(
    weights: dict[str, float], alone: tuple[float, float]
) -> None:
    more = allocated(weights) - alone[0]
    assert more > VOXELS
    assert predicted(weights) - alone[1] == pytest.approx(more, rel=0.25, abs=VOXELS / 2)


def test_a_containers_limit_counts_without_what_the_system_can_drop(tmp_path: Path) -> None:
    job = tmp_path / "cgroup" / "slurm" / "job_1"
    job.mkdir(parents=True)
    (tmp_path / "listed").write_text("0::/slurm/job_1\n")
    (tmp_path / "cgroup" / "memory.max").write_text("max\n")
    (job / "memory.max").write_text("1000\n")
    (job / "memory.current").write_text("700\n")
    (job / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert min(machine._limits(tmp_path / "cgroup", tmp_path / "listed")) == 1000 - 700 + 200


def test_what_a_user_allows_is_for_the_whole_process() -> None:
    assert machine.room(None) == pytest.approx(machine.free(), rel=0.2)
    assert machine.room(100.0) == pytest.approx(100 * machine.GIB - machine.held(), rel=1e-3)


def test_processes_on_one_machine_share_what_is_free_but_not_what_each_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "free", lambda *_: 900)
    assert machine.share(None) == 900
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert machine.share(None) == 300
    assert machine.share(100.0) == pytest.approx(100 * machine.GIB - machine.held(), rel=1e-3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine._beside(torch.device("cuda")) == 2  # the first and the third process have one GPU


def test_the_doctor_says_what_a_grid_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["regpipe", "doctor", "--shape", "32,32", "--device", "cpu", "--structures", "2", "--backbone", "plain"],
    )
    with pytest.raises(SystemExit) as end:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert not end.value.code and "32x32, cpu" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["registration,"] * 2 + ["registration", "training,", "files"]
    assert all(0.1 < float(line.split()[-2]) < 20 and line.endswith("yes") for line in lines[2:])


@pytest.mark.parametrize("wrong", [["--shape", "64"], ["--shape", "64,4"], ["--shape", "64,64", "--device", "tpu"]])
def test_the_doctor_refuses_in_a_line(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["regpipe", "doctor", *wrong])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1 and capsys.readouterr().err.startswith(f"error: {wrong[-2]}")


def test_a_limit_of_nothing_is_a_mistake() -> None:
    from regpipe.inference.ladder import FittingInferer

    with pytest.raises(InputError, match="more than 0"):
        FittingInferer(RegistrationInferer(), memory_gib=0)
