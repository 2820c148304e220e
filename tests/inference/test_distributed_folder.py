"""A folder shared out over two processes: each case once, one table, and what docs/distributed.md ships is valid."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from monai.bundle import run as run_bundle

from helpers.bundles import Command, deforming_bundle, infer
from helpers.places import ROOT
from helpers.processes import together
from regpipe.inference import folder
from regpipe.io.images import Grid
from regpipe.metrics.cases import read_rows
from regpipe.utils.errors import ENDED_TOGETHER, InputError, explain

DOCS = ROOT / "docs"

pytestmark = pytest.mark.usefixtures("one_thread")


def registering(rank: int, bundle: Path, data: Path, out: Path) -> tuple[list[str], int]:
    """The cases that this process registered, and its exit status."""
    done: list[str] = []
    save_case, status = folder.save_case, 0

    def noted(case: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        done.append(case["case"])
        return save_case(case, *args, **kwargs)

    folder.save_case = noted
    sys.stdout = (out.parent / f"said_by_{rank}").open("w")
    try:
        settings = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(out)}
        run_bundle(config_file=str(bundle / "configs" / "inference.yaml"), formats=["itk"], **settings)
    except SystemExit as end:
        status = int(end.code or 0)
    sys.stdout.flush()
    return done, status


def test_a_folder_is_shared_out_goes_on_and_no_case_is_done_twice(
    tmp_path: Path, cohort: Path, monai_bundle: Command
) -> None:
    bundle = deforming_bundle(tmp_path / "bundle", Grid((32, 32), (1.0, 1.0)))
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(cohort, data)
    (data / "moving_images" / "case_003.nii.gz").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        infer(monai_bundle, bundle, data, out, "--formats", "[itk]")
    alone = (out / "metrics.csv").read_text()
    shutil.rmtree(out / "case_001")
    (out / "metrics.csv").unlink()
    (out / "case_004" / "metrics.json").unlink()  # broken off
    before = {path: path.stat().st_mtime_ns for path in out.glob("case_00[02]/*")}

    (first, status), (second, other) = together(registering, tmp_path / "seen", bundle, data, out)
    assert sorted(first + second) == ["case_001", "case_004"] and first
    assert status == other == 1  # one case cannot be done
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("case_00[02]/*")}
    assert (out / "metrics.csv").read_text() == alone
    said, unsaid = ((tmp_path / f"said_by_{rank}").read_text() for rank in (0, 1))
    assert "2 of 5 cases are finished already" in said and "4 of 5 pairs registered" in said
    assert "1 failed:" in said and "case_003" in said and unsaid == ""

    (data / "moving_images" / "case_003.nii.gz").write_bytes((cohort / "moving_images/case_003.nii.gz").read_bytes())
    (first, status), (second, other) = together(registering, tmp_path / "seen", bundle, data, out)
    assert first + second == ["case_003"] and status == other == 0
    assert [row["case"] for row in read_rows(out / "metrics.csv")] == [f"case_00{i}" for i in range(5)]


def test_a_process_that_waits_ends_at_once_when_it_is_told_to_and_says_so() -> None:
    waits = "import os; from regpipe.utils import distributed; distributed._say_when_ended(); print(flush=True); "
    waits += "os.read(os.pipe()[0], 1)"
    process = subprocess.Popen([sys.executable, "-c", waits], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "\n"
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert said == f"error: {ENDED_TOGETHER}\n" and process.returncode == 143 and time.monotonic() - told < 5


def test_a_lost_process_is_told_in_a_line_and_other_errors_as_before() -> None:
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:5")
    wrapped = RuntimeError("Failed to evaluate '$@training_run.train()'")
    wrapped.__cause__ = lost
    assert explain(wrapped) == explain(lost) == ENDED_TOGETHER
    assert explain(RuntimeError("a mistake of ours")) is None
    assert explain(InputError("grid.json: missing")) == "grid.json: missing"


# the files of docs/distributed.md


SCRIPT = DOCS / "examples" / "slurm.sh"
SLURM = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "16"}


@pytest.mark.parametrize(("gpus", "processes", "threads"), [({"SLURM_GPUS_ON_NODE": "4"}, 4, 4), ({}, 16, 1)])
def test_the_slurm_script_starts_torchrun_with_the_command_as_given(tmp_path: Path, gpus, processes, threads) -> None:
    for name, does in (("scontrol", "echo n1; echo n2"), ("srun", 'printf "%s\\n" "$PWD" "$OMP_NUM_THREADS" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    told = [
        "run",
        "training",
        "--config_file",
        "['configs/train.yaml','configs/multi_gpu.yaml']",
        "--dataset_dir",
        "/a b",
    ]
    place = {"PATH": f"{tmp_path}:/usr/bin:/bin", **SLURM, **gpus}
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    ran = subprocess.run(["bash", SCRIPT, tmp_path, *told], env=place, check=True, capture_output=True, text=True)
    where, omp, *command = ran.stdout.splitlines()
    assert (where, omp) == (str(tmp_path), str(threads)) and ran.stderr == ""
    assert command[command.index("-m") :] == ["-m", "monai.bundle", *told]
    assert {"torchrun", "--nnodes=2", f"--nproc_per_node={processes}", "--rdzv_endpoint=n1:20041"} <= set(command)


CONTAINER = {
    "type": "object",
    "required": ["name", "image", "args"],
    "properties": {
        "name": {"type": "string"},
        "env": {"type": "array", "items": {"properties": {"name": {"type": "string"}, "value": {"type": "string"}}}},
        "command": {"type": "array", "items": {"type": "string"}},
        "args": {"type": "array", "items": {"type": "string"}},
        "resources": {"properties": {"limits": {"additionalProperties": {"type": "string"}}}},
        "volumeMounts": {"type": "array", "items": {"required": ["name", "mountPath"]}},
    },
}
REPLICAS: dict[str, Any] = {
    "type": "object",
    "required": ["replicas", "template"],
    "additionalProperties": False,
    "properties": {
        "replicas": {"type": "integer", "minimum": 1},
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        "template": {
            "required": ["spec"],
            "properties": {
                "spec": {
                    "required": ["containers"],
                    "properties": {
                        "containers": {
                            "type": "array",
                            "items": CONTAINER,
                            "contains": {"properties": {"name": {"const": "pytorch"}}},
                        }
                    },
                }
            },
        },
    },
}
PYTORCH_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "kubeflow.org/v1"},
        "kind": {"const": "PyTorchJob"},
        "metadata": {"required": ["name"], "properties": {"name": {"pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"}}},
        "spec": {
            "required": ["pytorchReplicaSpecs"],
            "additionalProperties": False,
            "properties": {
                "nprocPerNode": {"type": "string"},
                "runPolicy": {
                    "additionalProperties": False,
                    "properties": {
                        "cleanPodPolicy": {"enum": ["Running", "All", "None"]},
                        "backoffLimit": {"type": "integer"},
                    },
                },
                "pytorchReplicaSpecs": {
                    "required": ["Master"],
                    "additionalProperties": False,
                    "properties": {
                        "Master": {**REPLICAS, "properties": {**REPLICAS["properties"], "replicas": {"const": 1}}},
                        "Worker": REPLICAS,
                    },
                },
            },
        },
    },
}


def test_the_pytorch_job_has_the_operators_form_and_starts_what_its_pods_can_run() -> None:
    job = yaml.safe_load((DOCS / "examples" / "pytorchjob.yaml").read_text())
    jsonschema.validate(job, PYTORCH_JOB)
    specs = job["spec"]["pytorchReplicaSpecs"]
    pods = sum(spec["replicas"] for spec in specs.values())
    for spec in specs.values():
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        (command,) = container["args"]
        assert f"--nnodes={pods} --nproc_per_node={gpus} " in command and "\n" not in command
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        subprocess.run(["sh", "-n", "-c", command], check=True)
    broken = {**job, "spec": {"pytorchReplicaSpecs": {"Worker": specs["Worker"]}}}
    with pytest.raises(jsonschema.ValidationError, match="'Master' is a required property"):
        jsonschema.validate(broken, PYTORCH_JOB)
