"""Cluster manifests and scripts: manifests are validated against their schemas, the Slurm script is run."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from lightning_ckptless.membership.launch.torchrun import config_from_torchrun_args
from tests.house.code import REPOSITORY

CLUSTERS = REPOSITORY / "examples" / "clusters"
# Stubs of Slurm's programs for a cluster of one node.
STUBS = {
    "scontrol": "#!/bin/sh\necho localhost\n",
    "srun": '#!/bin/sh\nshift\nexec "$@"\n',
}


def documents(name: str) -> list[dict[str, Any]]:
    """Return the documents of a manifest."""
    return list(yaml.safe_load_all((CLUSTERS / name).read_text()))


@pytest.mark.parametrize("document", documents("kubernetes.yaml"), ids=lambda document: str(document["kind"]))
def test_kubernetes_manifests_are_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, "1.31", strict=True)


def test_trainjob_is_valid() -> None:
    (job,) = documents("kubeflow.yaml")
    parsed = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert parsed is not None
    # The model drops unknown fields.
    assert parsed.to_dict()["spec"] == job["spec"]


def command_of(arguments: list[str]) -> Any:
    """Return the configuration of an agent that a manifest starts."""
    return config_from_torchrun_args(arguments)


def test_the_first_pod_hosts_the_rendezvous() -> None:
    service, job = documents("kubernetes.yaml")
    pod = job["spec"]["template"]["spec"]
    config = command_of(pod["containers"][0]["args"])
    name, port = config.rdzv_endpoint.split(":")
    assert name == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert int(config.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["terminationGracePeriodSeconds"] > config.finish_grace_s + config.stop_grace_s
    assert (REPOSITORY / config.program.target).exists()


def test_variables_of_the_kubeflow_runtime_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = documents("kubeflow.yaml")
    trainer = job["spec"]["trainer"]
    for variable, value in {
        "PET_NNODES": trainer["numNodes"],
        "PET_NPROC_PER_NODE": trainer["numProcPerNode"],
        "PET_NODE_RANK": 0,
        "PET_MASTER_ADDR": "first",
        "PET_MASTER_PORT": 1234,
    }.items():
        monkeypatch.setenv(variable, str(value))
    config = command_of(trainer["args"])
    assert (config.nnodes, config.nproc, config.rdzv_endpoint, config.standbys) == ("2", 2, "first:1234", 1)


@pytest.mark.long
@pytest.mark.slow
def test_the_slurm_script_runs_unchanged(tmp_path: Path) -> None:
    for name, text in STUBS.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = [str(REPOSITORY / "examples" / "digits" / "train.py"), "--epochs", "1"]
    done = subprocess.run(
        ["bash", str(CLUSTERS / "slurm.sbatch"), *program],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_NNODES": "1",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "localhost",
            "PORT": port,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "run slurm-7" in done.stderr
    assert "fit ended" in done.stderr
