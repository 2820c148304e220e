"""Two processes are as good as one: the same weights, metrics and files; a process that is killed ends the job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pandas as pd
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from helpers.inprocess import as_if_in_its_own_process
from helpers.processes import together
from regpipe.bundle.write import write_bundle
from regpipe.data import sampling
from regpipe.engines import run
from regpipe.engines.handlers import Budget
from regpipe.networks.symmetric import SymmetricNet
from regpipe.utils import console, distributed
from regpipe.utils.errors import ENDED_TOGETHER

pytestmark = pytest.mark.usefixtures("one_thread")


# what is gathered, and what is agreed on


def agreements(rank: int) -> dict[str, Any]:
    # Slurm's own numbers, of the one task that runs torchrun: Ignite would go by them
    os.environ.update(SLURM_JOB_ID="7", SLURM_LOCALID="0", SLURM_PROCID="0", SLURM_NTASKS="1")
    distributed.join(hours=0.02)
    budget = Budget(100)
    budget.load_state_dict({"used": 10.0 + 50 * rank})
    found = {
        "rank": idist.get_rank(),
        "gathered": distributed.gathered({"of": rank}),
        "first": distributed.of_first(["list", rank]),
        "share": distributed.share("abcde"),
        "few": distributed.validation_indices(1),
        "spent": budget.spent,
        "silent": not console.first(),
    }
    distributed.leave()
    return {**found, "after": idist.get_world_size()}


def test_processes_share_out_gather_and_agree(tmp_path: Path) -> None:
    first, second = together(agreements, tmp_path)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["gathered"] == second["gathered"] == [{"of": 0}, {"of": 1}]
    assert first["first"] == second["first"] == ["list", 0]
    assert (first["share"], second["share"]) == (list("ace"), list("bd"))
    assert first["few"] == second["few"] == [0]
    assert first["spent"] == second["spent"] == 0.1  # rank 0's clock
    assert (first["silent"], second["silent"]) == (False, True)
    assert first["after"] == 1


def test_alone_nothing_is_shared_out() -> None:
    net = torch.nn.Linear(1, 1)
    distributed.join(hours=0.02)
    assert distributed.parallel(net) is net and distributed.share("abc") == list("abc")
    assert distributed.gathered(1) == [1] and distributed.of_first(2) == 2 and not torch.distributed.is_initialized()


@pytest.mark.parametrize(("size", "steps"), [(6, 2), (7, 3)])
def test_the_order_of_the_pairs_does_not_depend_on_the_number_of_processes(size, steps, monkeypatch) -> None:
    def order(world: int, epoch: int) -> list[list[int]]:
        monkeypatch.setattr(idist, "get_world_size", lambda: world)
        drawn = []
        for rank in range(world):
            monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
            sampler = sampling.PairSampler(torch.zeros(20, dtype=torch.bool), size, seed=5)
            sampler.set_epoch(epoch)
            drawn.append(list(sampler))
            assert len(drawn[-1]) == len(sampler)
        return [list(step) for step in zip(*drawn, strict=True)]

    alone = [pair for (pair,) in order(1, 1)]
    assert len(set(alone)) == size and alone != [pair for (pair,) in order(1, 2)]
    dealt = order(3, 1)
    assert len(dealt) == steps and [pair for step in dealt for pair in step][:size] == alone
    assert {pair for step in dealt for pair in step} == set(alone)  # what is repeated is of the same


# training

OPTIONS: dict[str, Any] = {
    "holdout": 5,
    "pairs_per_epoch": 3,
    "max_epochs": 4,
    "learning_rate": 0.005,
    "augment": 0.02,
    "validate#handlers#0#cases": 1,
}


def configs(bundle: Path, overlay: bool = True) -> list[str]:
    return [str(bundle / "configs" / f"{name}.yaml") for name in ("train", *(["multi_gpu"] if overlay else []))]


def training(rank: int, bundle: Path, data: Path) -> dict[str, Any]:
    """The bundle's own configuration; what each process saw and ended with."""
    flow = ConfigWorkflow(
        configs(bundle),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        run_id="training",
        bundle_root=str(bundle),
        dataset_dir=str(data),
        **OPTIONS,
    )
    flow.initialize()
    trainer, evaluator, network = map(
        flow.parser.get_parsed_content, ("train#trainer", "validate#evaluator", "network_def")
    )
    seen: dict[str, Any] = {"steps": [], "validated": [], "pid": os.getpid()}

    def step(engine: Any) -> None:
        seen["steps"].append((engine.state.epoch, *engine.state.batch["case"]))

    def validated(engine: Any) -> None:
        seen["validated"].append(dict(engine.state.metrics))
        seen["rows"] = engine.state.metric_details["cases"]

    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
    evaluator.add_event_handler(Events.COMPLETED, validated)
    flow.run()
    seen |= {"best": (evaluator.state.best_metric, evaluator.state.best_metric_epoch), "weights": network.state_dict()}
    flow.finalize()
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Four epochs in two processes without a stop. Do not write into the folder."""
    bundle = write_bundle("alexnet", tmp_path_factory.mktemp("trained") / "bundle")
    return bundle, together(training, bundle.parent / "seen", bundle, data)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_processes_hold_the_same_weights_and_the_same_best_epoch(trained) -> None:
    bundle, (first, second) = trained
    assert equal(first["weights"], second["weights"]) and first["best"] == second["best"]
    assert first["validated"] == second["validated"] and len(first["validated"]) == 4
    torch.manual_seed(0)
    assert not equal(first["weights"], SymmetricNet(2, "alexnet").state_dict())
    # three pairs an epoch in two steps of two: one is repeated
    pairs = [{case for e, case in (*first["steps"], *second["steps"]) if e == epoch} for epoch in range(1, 5)]
    assert len(first["steps"]) == len(second["steps"]) == 8 and all(len(cases) == 3 for cases in pairs)


def one_process(bundle: Path, data: Path, **settings: Any) -> ConfigWorkflow:
    settings = {"bundle_root": str(bundle), "dataset_dir": str(data), **OPTIONS, **settings}
    meta = str(bundle / "configs" / "metadata.json")
    with as_if_in_its_own_process():
        flow = ConfigWorkflow(configs(bundle, False), meta_file=meta, logging_file=False, run_id="training", **settings)
        flow.initialize()
    return flow


def test_metrics_over_uneven_shares_are_those_of_one_process(trained, data: Path, tmp_path: Path) -> None:
    _, (first, _) = trained
    flow = one_process(write_bundle("alexnet", tmp_path / "bundle"), data)
    evaluator = flow.parser.get_parsed_content("validate#evaluator")
    evaluator.network.load_state_dict(first["weights"])
    evaluator.run()
    rows = evaluator.state.metric_details["cases"]
    assert [row["case"] for row in first["rows"]] == [row["case"] for row in rows] and len(rows) == 5
    assert first["validated"][-1] == pytest.approx(evaluator.state.metrics, abs=1e-6, nan_ok=True)


def test_one_process_writes_and_what_it_writes_knows_nothing_of_the_others(trained) -> None:
    bundle, (first, second) = trained
    assert sorted(path.name for path in (bundle / "models").iterdir()) == [
        *("checkpoint_3.pt", "checkpoint_4.pt", "curves.txt", "manifest.json", "model.pt", "training.json"),
        *("typical.json", "working_grid.json"),
    ]
    curves = [path.name.split(".") for path in (bundle / "eval" / "tensorboard").iterdir()]
    assert curves and all(str(first["pid"]) in name and str(second["pid"]) not in name for name in curves)
    saved = torch.load(bundle / "models" / "checkpoint_4.pt", weights_only=True)
    assert equal(saved["network"], first["weights"])  # without the wrapper's prefix


def evaluating(rank: int, bundle: Path, data: Path, out: Path) -> None:
    overlays = ["train", "evaluate", *(["multi_gpu"] if "RANK" in os.environ else [])]
    flow = ConfigWorkflow(
        [str(bundle / "configs" / f"{name}.yaml") for name in overlays],
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        run_id="evaluating",
        bundle_root=str(bundle),
        dataset_dir=str(data),
        output_dir=str(out),
    )
    flow.initialize()
    flow.run()
    flow.finalize()


def test_an_evaluation_in_two_processes_says_what_one_says(trained, data: Path, tmp_path: Path) -> None:
    bundle, _ = trained
    together(evaluating, tmp_path / "seen", bundle, data, tmp_path / "two")
    with as_if_in_its_own_process():
        evaluating(0, bundle, data, tmp_path / "one")
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, rtol=1e-5)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert [m["machine"].get("processes", 1) for m in manifests] == [1, 2]


def rank_of(process: int) -> str:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((v.partition(b"=")[2].decode() for v in variables if v.startswith(b"RANK=")), "none")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_process_ends_the_job_and_the_same_command_goes_on(trained, data: Path, tmp_path: Path) -> None:
    bundle = write_bundle("alexnet", tmp_path / "bundle")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "training"]
    command += ["--config_file", str(configs(bundle)), "--bundle_root", str(bundle)]
    command += ["--dataset_dir", str(data)]
    command += [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (bundle / "models" / "checkpoint_1.pt").exists():
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        children = [int(child) for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        os.kill(next(child for child in children if rank_of(child) == "0"), signal.SIGKILL)  # the one that writes
        output = job.communicate(timeout=30)[0]
    finally:
        job.kill()
    assert job.returncode != 0 and f"error: {ENDED_TOGETHER}" in output
    assert run.saved_states(bundle / "models") and not (bundle / "models" / "checkpoint_4.pt").exists()
    first, second = together(training, tmp_path / "seen", bundle, data)
    assert 0 < len(first["steps"]) < 8 and equal(first["weights"], second["weights"])
    assert equal(first["weights"], trained[1][0]["weights"])  # as if nothing had happened
    assert first["best"] == trained[1][0]["best"]


def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(trained, data: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(trained[0], bundle)
    with as_if_in_its_own_process():
        one_process(bundle, data, max_epochs=5).run()
    saved = torch.load(bundle / "models" / "checkpoint_5.pt", weights_only=True)
    assert saved["trainer"]["epoch_length"] == 3 and saved["trainer"]["iteration"] == 15
    # the same command for two: their four epochs are done, so the fifth is left out
    shutil.rmtree(bundle / "models")
    shutil.copytree(trained[0] / "models", bundle / "models")
    with as_if_in_its_own_process():
        one_process(bundle, data, max_epochs=1, resume=False).run()
    first, _ = together(training, tmp_path / "seen", bundle, data)
    assert [epoch for epoch, _ in first["steps"]] == [2, 2, 3, 3, 4, 4]
