"""Kill training and folder inference at random moments, give the same command again until it ends, compare.

    OMP_NUM_THREADS=1 python tests/benchmarks/kills.py [--kills 30] [--seed 0] [--epochs 6] [--cases 12] [-o FILE]

Every second kill is by the clock, the others at a random operation on files: before one is opened, renamed, cut or
deleted, or where half of one has reached the disk. Each process is a fork of this one, which has loaded everything and
run nothing: a command then takes a second and not ten. Linux and macOS, on the CPU.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # before torch and ITK

import argparse
import collections
import csv
import functools
import itertools
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fire
import itk  # noqa: F401  (loaded here, so that no fork has to)
import monai.bundle
import torch
import torch.utils.tensorboard  # noqa: F401
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import regpipe.engines.evaluation
import regpipe.inference.folder
import regpipe.report.mlflow  # noqa: F401
from regpipe.bundle.write import write_bundle
from regpipe.data import manifest
from regpipe.engines.checkpoints import saved_states
from regpipe.phantoms.cohort import write_cohort
from regpipe.utils.files import damage

TOLD_ONCE = ("about/", "custom_scalars__", "_hparams_")  # by each process that goes on: the run in words


class Failed(Exception):
    """What a kill did to a result."""


class Moment(NamedTuple):
    """When a process is killed: after so many seconds, or at so many operations on files; one of them."""

    seconds: float | None = None
    operation: int | None = None


class Command(NamedTuple):
    """A command line of ``python -m monai.bundle``, and the folder that it writes to."""

    words: Sequence[str]
    folder: Path


class Operations:
    """Counts what a process does to the files of a folder, and kills it at one of these operations."""

    def __init__(self, folder: Path, fatal: int | None) -> None:
        self.folder, self.fatal, self.count = str(folder), fatal, 0
        self._fsync = os.fsync
        os.fsync = self._half  # type: ignore[assignment]
        sys.addaudithook(self._heard)

    def _heard(self, event: str, given: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.truncate")) and str(given[0]).startswith(self.folder):
            self._next()

    def _half(self, handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        path = os.readlink(f"/proc/self/fd/{number}") if sys.platform == "linux" else ""
        if self.count + 1 == self.fatal and os.path.isfile(path):
            os.truncate(path, os.path.getsize(path) // 2)
        self._next()
        self._fsync(handle)

    def _next(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def run(command: Command, moment: Moment, aside: Path) -> int:
    """Exit status of a fork that runs the command; -9 where it was killed first."""
    pid = os.fork()
    if pid == 0:
        _child(command, moment, aside)
    begun = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if moment.seconds is not None and time.monotonic() - begun > moment.seconds:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL
        time.sleep(0.005)


def _child(command: Command, moment: Moment, aside: Path) -> None:
    os.setsid()
    log = os.open(aside / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    status, operations = 1, Operations(command.folder, moment.operation)
    try:
        fire.Fire({"run": monai.bundle.run}, command=list(command.words), name="monai.bundle")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        (aside / "operations").write_text(str(operations.count))
        sys.stdout.flush()
        os._exit(status)


def undisturbed(command: Command, aside: Path) -> tuple[float, int]:
    """Seconds that the command takes, and its operations on files."""
    begun = time.monotonic()
    if run(command, Moment(), aside) != 0:
        raise Failed(f"the undisturbed run failed: {(aside / 'log').read_text()[-2000:]}")
    return time.monotonic() - begun, int((aside / "operations").read_text())


# ------------------------------------------------------------------------------------------- what is compared


def curves(folder: Path) -> list[tuple[str, int, bytes]]:
    """All that the event files of a run tell, in the order of name and step: what is told twice stands there twice."""
    told = []
    for path in sorted(folder.glob("events.out.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not value.tag.startswith((*TOLD_ONCE, "best/training_seconds")):
                    told.append((value.tag, event.step, value.SerializeToString(deterministic=True)))
    return sorted(told)


def same(a: Any, b: Any) -> bool:
    """To the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


class Trained:
    """What a finished training left, without what is of its own time and place."""

    def __init__(self, bundle: Path) -> None:
        self.model = load(bundle / "models" / "model.pt")
        self.state = load(saved_states(bundle / "models")[-1])
        self.curves = curves(bundle / "eval" / "tensorboard")
        self.files = {path.name for path in (bundle / "models").iterdir()}
        del self.state["curves"], self.state["progress"]["seconds"], self.state["budget"]

    def compare(self, other: Trained) -> None:
        for name in ("model", "state", "curves", "files"):
            if not same(getattr(self, name), getattr(other, name)):
                raise Failed(f"{name}: not that of the undisturbed run, {self.files} and {other.files}")

    def finished(self) -> str:
        steps = sum(tag == "training/loss" for tag, *_ in self.curves)
        best = self.state["progress"]["metric"][1]
        return f"{steps} steps, the best in epoch {best}, {len(self.curves)} values in TensorBoard"


class Bundle(NamedTuple):
    """What is seen of a bundle after each kill of its training, and at the end."""

    bundle: Path
    reference: Trained

    def look(self) -> None:
        """No saved state or model is ever half of one."""
        for path in (*saved_states(self.bundle / "models"), self.bundle / "models" / "model.pt"):
            if path.exists() and (damage(path) or not load(path)):
                raise Failed(f"{path.name} is damaged")

    def end(self) -> None:
        Trained(self.bundle).compare(self.reference)


def visible(out: Path) -> dict[str, bytes]:
    """Contents of the results, by path; what lies aside of one has a name that begins with a dot."""
    found = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(out)): content(path) for path in found}


def content(path: Path) -> bytes:
    """A file's bytes; of a manifest without when it was written and what that took."""
    if path.name != manifest.NAME:
        return path.read_bytes()
    told = manifest.read(path)
    return json.dumps({key: told[key] for key in told if key not in ("finished", "seconds")}).encode()


class Folder:
    """What is seen of a folder's results after each kill, and at the end."""

    def __init__(self, out: Path, reference: dict[str, bytes]) -> None:
        self.out, self.reference = out, reference
        self.finished: dict[Path, int] = {}

    def look(self) -> None:
        """Each file is that of the undisturbed run, and no finished case was done again."""
        for name, seen in visible(self.out).items():
            if name != "metrics.csv" and seen != self.reference[name]:
                raise Failed(f"{name} is not that of the undisturbed run")
        now = {path: path.stat().st_mtime_ns for path in self.out.glob("*/metrics.json")}
        if any(now.get(path) != stamp for path, stamp in self.finished.items()):
            raise Failed("a finished case was done again")
        self.finished = now

    def end(self) -> None:
        self.look()
        if visible(self.out) != self.reference:
            raise Failed("the results are not those of the undisturbed run")
        for left in self.out.rglob(".*"):
            raise Failed(f"{left} was left behind")


# ------------------------------------------------------------------------------------------- the kills


class Plan(NamedTuple):
    """What is killed, and how."""

    what: str  # for the table
    limits: tuple[float, int]  # seconds and operations on files of the undisturbed run: a moment is drawn from these
    rng: random.Random
    aside: Path


def disturb(plan: Plan, command: Command, most: int, look: Callable[[], None]) -> list[dict[str, Any]]:
    """Kill the command at up to ``most`` random moments, one start after another, and look; then let it end."""
    what, limits, rng, aside = plan
    rows: list[dict[str, Any]] = []
    while len(rows) < most:
        by_clock = rng.random() < 0.5
        moment = Moment(rng.uniform(0, limits[0])) if by_clock else Moment(operation=rng.randint(1, limits[1]))
        status = run(command, moment, aside)
        if status == 0:
            return rows
        if status != -signal.SIGKILL:
            raise Failed(f"{what} ended with {status}: {(aside / 'log').read_text()[-2000:]}")
        look()
        left = sum(path.name.startswith(".") for path in command.folder.rglob("*"))
        rows.append({"what": what, "seconds": moment.seconds, "operation": moment.operation, "left aside": left})
    status = run(command, Moment(), aside)
    if status != 0:
        raise Failed(f"{what} ended with {status}: {(aside / 'log').read_text()[-2000:]}")
    return rows


def killed(
    plan: Plan, command: Callable[[str], Command], seen: Callable[[Path], Bundle | Folder], kills: int
) -> list[dict[str, Any]]:
    """Disturb the command of one new folder after another; what is ``seen`` of each ends as the undisturbed run."""
    rows, number = list[dict[str, Any]](), itertools.count()
    while len(rows) < kills:
        disturbed = command(f"{plan.what}_{next(number)}")
        eyes = seen(disturbed.folder)
        rows += disturb(plan, disturbed, min(10, kills - len(rows)), eyes.look)
        eyes.end()
        print(f"{plan.what}: {len(rows)} kills, and the same as undisturbed", flush=True)
    return rows


def of_bundle(bundle: Path, folder: Path, config: str, *run: str, **told: object) -> Command:
    """A run of the bundle's own configuration, which writes to ``folder``."""
    told = {"config_file": bundle / "configs" / config, "bundle_root": bundle, **told}
    told["logging_file"] = bundle / "configs" / "logging.conf"
    words = [word for key, value in told.items() for word in (f"--{key}", str(value))]
    return Command(["run", *run, *words], folder)


def training(root: Path, kills: int, rng: random.Random, epochs: int) -> list[dict[str, Any]]:
    data = write_cohort(root / "data", shape=(32, 32), n_pairs=8)
    told: dict[str, Any] = {"holdout": 2, "pairs_per_epoch": 4, "max_epochs": epochs, "learning_rate": 0.005}
    told["key_metric"] = "ncc"  # gets better from epoch to epoch, so that the best model changes

    def command(name: str) -> Command:
        bundle = write_bundle("alexnet", root / name)
        return of_bundle(bundle, bundle, "train.yaml", "training", dataset_dir=data, **told)

    limits = undisturbed(command("trained"), root)
    whole = Trained(root / "trained")
    print(f"training: {limits[0]:.1f} s, {limits[1]} operations on files, {whole.finished()}", flush=True)
    return killed(Plan("training", limits, rng, root), command, functools.partial(Bundle, reference=whole), kills)


def inference(root: Path, kills: int, rng: random.Random, cases: int) -> list[dict[str, Any]]:
    data, bundle = write_cohort(root / "new", shape=(32, 32), n_pairs=cases, seed=1), root / "trained"

    def command(name: str) -> Command:
        return of_bundle(bundle, root / name, "inference.yaml", dataset_dir=data, output_dir=root / name)

    limits = undisturbed(command("registered"), root)
    whole = visible(root / "registered")
    print(f"inference: {limits[0]:.1f} s, {limits[1]} operations on files, {len(whole)} files", flush=True)
    return killed(Plan("inference", limits, rng, root), command, functools.partial(Folder, reference=whole), kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of the training, and as many of inference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("-o", "--out", type=Path, help="a line per kill, as CSV")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as root:
        rows = training(Path(root), given.kills, rng, given.epochs)
        rows += inference(Path(root), given.kills, rng, given.cases)
    for what, number in collections.Counter(row["what"] for row in rows).items():
        print(f"{what}: killed {number} times, the same as undisturbed")
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
