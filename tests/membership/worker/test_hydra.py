"""The run folder of a script that Hydra runs is passed to processes on their command lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ckptless import environment
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.worker.hydra import (
    folder_of_run,
    folder_of_sweep,
    imports_hydra,
    with_folder,
    without_folder,
)
from lightning_ckptless.membership.worker.program import Program
from tests.membership.conftest import script


def environment_of(folder: str, local_rank: int) -> dict[str, str]:
    return {environment.HYDRA: folder, "LOCAL_RANK": str(local_rank), "HOME": "/home"}


@pytest.mark.parametrize(
    ("folder", "local_rank", "more"),
    [
        (folder_of_run("/out/a b"), 0, ('hydra.run.dir="/out/a b"', "hydra.output_subdir=null")),
        (folder_of_sweep("/out"), 0, ('hydra.sweep.dir="/out"',)),
        (
            folder_of_sweep("/out"),
            2,
            ('hydra.sweep.dir="/out"', "hydra.job.name=train_ddp_process_2", "hydra.output_subdir=null"),
        ),
        (folder_of_run('/a="b"'), 0, ('hydra.run.dir="/a=\\"b\\""', "hydra.output_subdir=null")),
    ],
)
def test_the_folder_comes_after_the_arguments_of_the_script(
    folder: str, local_rank: int, more: tuple[str, ...]
) -> None:
    program = with_folder(Program("script", "train.py", ("seed=1",)), environment_of(folder, local_rank))
    assert program.args == ("seed=1", *more)


def test_a_script_without_a_folder_is_left_alone() -> None:
    program = Program("script", "train.py", ("seed=1",))
    assert with_folder(program, {"LOCAL_RANK": "0"}) is program
    shell = Program("executable", "train.sh")
    assert with_folder(shell, environment_of(folder_of_run("/out"), 0)) is shell


def test_processes_started_by_the_script_do_not_inherit_the_folder() -> None:
    assert without_folder(environment_of(folder_of_run("/out"), 0)) == {"LOCAL_RANK": "0", "HOME": "/home"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import hydra\n", True),
        ("import torch\n  from hydra import main\n", True),
        ("import hydration\n", False),
        ("# import hydra\n", False),
    ],
)
def test_a_script_that_imports_hydra_is_recognized_by_its_text(text: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(text)
    assert imports_hydra(Program("script", "package/train.py"), tmp_path) is found
    assert imports_hydra(Program("module", "package.train"), tmp_path) is found
    assert not imports_hydra(Program("module", "package.absent"), tmp_path)
    assert not imports_hydra(Program("executable", "package/train.py"), tmp_path)


ASKS = """
    import json, os, signal, sys
    from pathlib import Path
    from lightning_ckptless import environment
    from lightning_ckptless.membership.channel.agent_channel import open_channel
    from lightning_ckptless.protocol.messages import ReachedTrainer
    if "--never" in sys.argv:
        import hydra
    rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(f"argv-{rank}-{restarts}.json").write_text(json.dumps([sys.argv[1:], environment.HYDRA in os.environ]))
    open_channel().send(ReachedTrainer(f"run=/of-{rank}"))
    if (rank, restarts) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    signal.sigwait({signal.SIGTERM}) if restarts == "0" else None
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_all_processes_get_the_folder_of_the_first(
    fresh: bool, bare: ForkServer, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = LaunchConfig(program=script(write(ASKS), "seed=1"), nproc=2, cwd=tmp_path, fresh=fresh, stop_grace_s=0.5)
    assert run(config, parent=bare).restarts == 1

    def started_with(rank: int, restarts: int) -> list[object]:
        found: list[object] = json.loads((tmp_path / f"argv-{rank}-{restarts}.json").read_text())
        return found

    given = ["seed=1", 'hydra.run.dir="/of-0"']
    assert started_with(0, 0) == [["seed=1"], False]
    others = [*given, "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert started_with(1, 0) == started_with(1, 1) == [others, False]
    assert started_with(0, 1) == [[*given, "hydra.output_subdir=null"], False]
