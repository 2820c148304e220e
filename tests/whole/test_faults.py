"""Disk full, permission lost, out of memory, a worker dying: one line, what is finished is kept, and it goes on."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from torch.utils.data import get_worker_info

from helpers.bundles import Command, deforming_bundle, infer
from helpers.places import BENCHMARKS
from helpers.training import Trained, assert_same, train
from regpipe.bundle.write import write_bundle
from regpipe.data.augment import RandomAffine
from regpipe.engines import run
from regpipe.io.images import Grid
from regpipe.phantoms.cohort import write_cohort
from regpipe.report.tensorboard import Curves
from regpipe.utils import files
from regpipe.utils.distributed import NoWriter
from regpipe.utils.errors import cause, explain, one_line_errors

pytestmark = pytest.mark.usefixtures("restored")

EPOCHS = 3
Fault = Callable[..., Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> tuple[Trained, list]:
    """What a training leaves, and its curves."""
    bundle = write_bundle("alexnet", tmp_path_factory.mktemp("undisturbed") / "bundle")
    return train(bundle, cohort, EPOCHS), curves(bundle)


def curves(bundle: Path) -> list[tuple[str, int, bytes]]:
    """All scalars and pictures of the run, as often as they were told."""
    told = []
    for path in (bundle / "eval" / "tensorboard").glob("events.out.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.startswith(("training/", "validation/", "case_", "best/dice")):
                    told.append((value.tag, event.step, value.SerializeToString(deterministic=True)))
    return sorted(told)


def at_call(number: int, real: Fault, error: BaseException | None = None) -> Fault:
    """A function that raises at one of its calls and is the real one else."""
    count = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number and error is not None:
            raise error
        return real(*args, **kwargs)

    return call


def broken_off(bundle: Path, cohort: Path, **options: Any) -> str:
    """What the user is told of a training that ends with an error."""
    with pytest.raises(Exception) as caught:
        train(bundle, cohort, EPOCHS, **options)
    told = explain(caught.value)
    assert told is not None and "\n" not in told
    return told


def assert_goes_on(bundle: Path, cohort: Path, undisturbed: tuple[Trained, list]) -> None:
    done = train(bundle, cohort, EPOCHS)
    done.curve, done.validations = undisturbed[0].curve, undisturbed[0].validations  # of this part alone
    assert_same(done, undisturbed[0])
    assert curves(bundle) == undisturbed[1]
    assert not list((bundle / "models").glob(".*"))


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("number", [5, 7])  # of the files written: the states of the first and second epoch
def test_a_full_disk_ends_a_training_in_a_line_and_the_same_command_goes_on(
    number, bundle, cohort, undisturbed, monkeypatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files, "replace_file", at_call(number, files.replace_file, full), raising=True)
    for module in ("engines.record", "io.images", "report.tensorboard"):
        monkeypatch.setattr(f"regpipe.{module}.replace_file", files.replace_file)
    told = broken_off(bundle, cohort)
    assert "No space left on device; free some space" in told
    assert "the same command goes on from the last whole epoch" in told
    assert all(files.damage(path) is None for path in run.saved_states(bundle / "models"))
    monkeypatch.undo()
    assert_goes_on(bundle, cohort, undisturbed)


def test_a_disk_too_full_for_the_curves_ends_a_training_in_a_line(
    bundle, cohort, undisturbed, monkeypatch, capfd
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(LocalFileSystem, "append", at_call(20, LocalFileSystem.append, full))
    monkeypatch.setattr("threading.excepthook", sys.__excepthook__)
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    one_line_errors()  # as the command has it
    told = broken_off(bundle, cohort)
    assert "writing: No space left on device; free some space" in told and "goes on" in told
    assert "Traceback" not in capfd.readouterr().err  # of the thread that writes
    monkeypatch.undo()
    assert_goes_on(bundle, cohort, undisturbed)


def test_a_lost_permission_ends_a_training_in_a_line(bundle, cohort, undisturbed, monkeypatch) -> None:
    real = os.replace

    def lost(source: str, target: str) -> None:
        if Path(target).name == "checkpoint_2.pt":
            raise PermissionError(errno.EACCES, "Permission denied", source, None, target)
        real(source, target)

    monkeypatch.setattr(files.os, "replace", lost)
    told = broken_off(bundle, cohort)
    assert ".pt: Permission denied; ask for the right to it" in told
    monkeypatch.undo()
    assert_goes_on(bundle, cohort, undisturbed)


ALLOCATION = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"


def test_memory_that_is_not_there_ends_a_training_in_a_line(bundle, cohort, undisturbed) -> None:
    def stop(engine: Any) -> None:
        if engine.state.iteration == 4:
            raise RuntimeError(ALLOCATION)

    told = broken_off(bundle, cohort, stop=stop)
    assert told.startswith("out of memory in epoch 2: ") and "goes on from the last whole epoch" in told
    assert_goes_on(bundle, cohort, undisturbed)


def test_a_training_that_diverges_names_term_case_and_step_and_keeps_the_last_good_state(
    bundle, cohort, undisturbed
) -> None:
    def blow_up(engine: Any) -> None:
        if engine.state.iteration == 3:
            next(engine.network.parameters()).data.mul_(1e30)

    told = broken_off(bundle, cohort, stop=blow_up)
    assert "is not finite at iteration 4, case case_00" in told and told.startswith("loss term diffusion")
    assert [path.name for path in run.saved_states(bundle / "models")] == ["checkpoint_1.pt"]
    assert all(value.isfinite().all() for value in Trained().load(bundle).model.values())
    assert_goes_on(bundle, cohort, undisturbed)


def test_a_worker_that_dies_ends_a_training_in_a_line(bundle, cohort, undisturbed, monkeypatch) -> None:
    real = RandomAffine.__call__

    def killed(self: RandomAffine, case: Any) -> Any:
        if get_worker_info() is not None and "case_003" in case["case"]:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory is short
        return real(self, case)

    monkeypatch.setattr(RandomAffine, "__call__", killed)
    told = broken_off(bundle, cohort, num_workers=1)
    assert told.startswith("a process that loads data was ended in epoch ") and "fewer --num_workers" in told
    monkeypatch.undo()
    assert_goes_on(bundle, cohort, undisturbed)


@pytest.mark.parametrize("killed", [1, 4])
def test_a_step_that_is_done_again_is_drawn_once(killed, bundle, cohort, undisturbed) -> None:
    def stop(engine: Any) -> None:
        if engine.state.iteration == killed:
            raise ZeroDivisionError

    with pytest.raises(RuntimeError):
        train(bundle, cohort, EPOCHS, stop=stop)
    drawn = {step for tag, step, _ in curves(bundle) if tag == "training/loss"}
    assert killed - 1 in drawn or killed == 1
    assert_goes_on(bundle, cohort, undisturbed)


def test_a_finished_training_that_is_asked_for_again_is_drawn_once(bundle, cohort, undisturbed) -> None:
    train(bundle, cohort, EPOCHS)
    assert_goes_on(bundle, cohort, undisturbed)


# ------------------------------------------------------------------------------------------- curves


def test_curves_of_other_runs_in_the_same_folder_are_left_alone(tmp_path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def tell(states: str, steps: range, taken: dict[str, int]) -> dict[str, int]:
        """A process that takes up its curves, draws some steps, and is killed after the state it gives."""
        with SummaryWriter(str(tmp_path / "log")) as writer:
            own = Curves(writer, str(tmp_path / states))
            own.load_state_dict(taken)
            for step in steps:
                writer.add_scalar(states, step, step)
            state = own.state_dict()
            writer.add_scalar(states, -1, steps[-1] + 1)
            return state

    tell("other", range(3), {})
    first = tell("mine", range(3), {})
    tell("mine", range(3, 5), first)  # killed before its state was saved
    second = tell("mine", range(3, 6), first)
    tell("mine", range(6, 7), second)

    found: dict[str, list[int]] = {"mine": [], "other": []}
    for path in (tmp_path / "log").iterdir():
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found[value.tag].append(event.step)
    assert sorted(found["mine"]) == list(range(8)) and sorted(found["other"]) == list(range(4))


def test_a_process_that_does_not_write_has_no_curves(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("regpipe.report.tensorboard.idist.get_rank", lambda: 1)
    own = Curves(NoWriter(), str(tmp_path))  # type: ignore[arg-type]
    own.load_state_dict({"events": 3})
    assert own.state_dict() == {} and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- a folder of cases


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deforming_bundle(tmp_path_factory.mktemp("model") / "bundle", Grid((24, 24), (1.0, 1.0)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("new") / "cohort", shape=(24, 24), n_pairs=3)


@pytest.fixture(scope="module")
def registered(
    tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path, monai_bundle: Command
) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("registered")
    infer(monai_bundle, model, data, out)
    return contents(out)


FILES = 25  # of a case, each written once


def contents(out: Path) -> dict[str, bytes]:
    """Every file's bytes; of a manifest without when that was and how long it took."""
    timed = re.compile(rb'"seconds": [0-9.]+|"finished": "[^"]+"')
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: timed.sub(b"", data) if name.endswith("manifest.json") else data for name, data in found.items()}


def test_registering_twice_gives_the_same_bytes(tmp_path, model, data, registered, monai_bundle) -> None:
    infer(monai_bundle, model, data, tmp_path)
    found = contents(tmp_path)
    assert found.keys() == registered.keys() and len(found) == 3 * FILES + 2
    assert [name for name in found if found[name] != registered[name]] == []


@pytest.mark.parametrize("number", [3, FILES + 3])  # of the files written: in the first case, in the second
def test_a_full_disk_ends_a_folder_in_a_line_and_the_finished_cases_are_kept(
    number, tmp_path, model, data, registered, monai_bundle, monkeypatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, "replace", at_call(number, os.replace, full))
    with pytest.raises(Exception) as caught:
        infer(monai_bundle, model, data, tmp_path)
    told = str(cause(caught.value))
    assert "No space left on device; free some space" in told and "goes on with the cases that are left" in told
    left = contents(tmp_path)
    assert len(list(tmp_path.iterdir())) == number // FILES
    assert left.keys() == {name for name in registered if f"case_{number // FILES:03d}" > name}  # none of a broken case
    assert all(content == registered[name] for name, content in left.items())
    monkeypatch.undo()
    infer(monai_bundle, model, data, tmp_path)
    assert contents(tmp_path) == registered


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "case_001: {}: cannot be written (Permission denied)"),
        (ValueError("height and width must be > 0"), "  case_001: cannot be written (height and width must be > 0)"),
    ],
    ids=["may not be written", "nobody foresaw it"],
)
def test_a_case_that_fails_leaves_nothing_and_the_others_are_done(
    error, line, tmp_path, model, data, registered, monai_bundle, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(files.os, "replace", at_call(FILES + 5, os.replace, error))
    with pytest.raises(SystemExit) as end:
        infer(monai_bundle, model, data, tmp_path)
    assert end.value.code == 1
    said = capsys.readouterr()
    assert line.format(tmp_path / "case_001") in said.out
    assert "case_001: case_001:" not in said.out + said.err
    assert {path.name for path in tmp_path.iterdir()} == {"case_000", "case_002", "metrics.csv", "volumes.csv"}
    monkeypatch.undo()
    infer(monai_bundle, model, data, tmp_path)
    assert contents(tmp_path) == registered


def test_what_a_kill_left_aside_in_a_case_is_gone_when_it_is_done(
    tmp_path, model, data, registered, monai_bundle
) -> None:
    (tmp_path / "case_001").mkdir()
    for name in (".warped.nii.gz.4711", "warped.nii.gz", ".moving_to_fixed.h5.4711"):
        (tmp_path / "case_001" / name).write_bytes(b"half of")
    (tmp_path / ".metrics.csv.4711").write_bytes(b"half of")
    infer(monai_bundle, model, data, tmp_path)
    assert contents(tmp_path) == registered


# ------------------------------------------------------------------------------------------- kills


@pytest.mark.slow  # a process that loads everything, and its forks
def test_killed_at_random_moments_both_end_as_if_undisturbed(tmp_path) -> None:
    script = BENCHMARKS / "kills.py"
    words = [sys.executable, str(script), "--kills", "3", "--epochs", "2", "--cases", "2", "-o", str(tmp_path / "k")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed 3 times, the same as undisturbed") == 2
    assert len((tmp_path / "k").read_text().splitlines()) == 7


def test_what_a_thread_is_refused_is_told_once_and_a_bug_in_one_is_shown(monkeypatch) -> None:
    import threading

    shown: list[Any] = []
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr("threading.excepthook", shown.append)
    one_line_errors()
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")):
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, None)))
    assert [str(about.exc_value) for about in shown] == ["a bug"]
