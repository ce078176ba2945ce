"""torchrun's options in our configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from lightning_ckptless import environment
from lightning_ckptless.configuration.variables import variables_of, with_variables
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.launch.config import DEFAULT_PRELOAD, LaunchConfig
from lightning_ckptless.membership.launch.torchrun import config_from_torchrun_args
from lightning_ckptless.options import CkptlessOptions


def read(line: str) -> LaunchConfig:
    return config_from_torchrun_args(line.split())


def test_the_script_and_its_arguments() -> None:
    program = read("--nproc-per-node 2 train.py --nproc-per-node 9 -- x").program
    assert (program.kind, program.target, program.args) == ("script", "train.py", ("--nproc-per-node", "9", "--", "x"))
    program = read("-m -- package.train fit").program
    assert (program.kind, program.target, program.args) == ("module", "package.train", ("fit",))
    assert read("--no-python ./train.sh").program.kind == "executable"


def test_defaults() -> None:
    config = read("train.py")
    assert (config.nproc, config.nnodes, config.rdzv_endpoint, config.max_restarts) == (1, "1:1", "", None)
    assert (config.preload, config.fresh, config.run_root) == (DEFAULT_PRELOAD, False, Path("ckptless"))


def test_the_run_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTLESS_RUN_ROOT", "/elsewhere")
    assert read("train.py").run_root == Path("/elsewhere")
    assert read("--run-root /runs train.py").run_root == Path("/runs")


def test_arguments_of_the_script_are_not_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read("train.py --rdzv-id mine --no-preload --standbys 3")
    assert (config.is_named, config.fresh, config.standbys) == (False, False, None)
    assert config.program.args == ("--rdzv-id", "mine", "--no-preload", "--standbys", "3")
    assert (read("--rdzv-id mine train.py").is_named, read("--rdzv-id mine train.py").run_id) == (True, "mine")
    monkeypatch.setenv("PET_RDZV_ID", "mine")
    assert read("train.py").is_named
    monkeypatch.chdir(tmp_path)
    Path("other.py").write_text("import pytorch_lightning")
    assert read("--log-dir other.py train.py").preload == DEFAULT_PRELOAD


def test_our_own_options() -> None:
    config = read("--preload a.b --preload c --no-preload --run-root /runs --arena-dir /shm --max-restarts 3 train.py")
    assert config.preload == (*DEFAULT_PRELOAD, "a.b", "c")
    assert (config.fresh, config.run_root, config.arena_dir) == (True, Path("/runs"), Path("/shm"))
    assert config.max_restarts == 3
    config = read("--max-recoveries-without-progress 4 --max-recoveries-per-hour 50 train.py")
    assert (config.max_recoveries_without_progress, config.max_recoveries_per_hour) == (4, 50)


def test_options_of_durable_states_are_passed_to_the_workers() -> None:
    assert set(variables_of(read("train.py"))) == {environment.RUN_ROOT}
    words = "--durable-every-n-steps 50 --durable-every-s 2.5 --durable-dir states"
    passed = variables_of(read(f"{words} train.py"))
    assert passed.pop(environment.RUN_ROOT) == str(Path("ckptless").absolute())
    assert passed == {
        environment.DURABLE_EVERY_N_STEPS: "50",
        environment.DURABLE_EVERY_S: "2.5",
        environment.DURABLE_DIR: str(Path("states").absolute()),
    }
    assert with_variables(CkptlessOptions(), passed) == CkptlessOptions(
        durable_every_n_steps=50, durable_every_s=2.5, durable_dir=Path("states").absolute()
    )
    with pytest.raises(OptionsError, match="durable_every_n_steps=0: expected an integer of at least 1"):
        read("--durable-every-n-steps 0 train.py")


def test_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "7")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    assert (read("train.py").max_restarts, read("train.py").nproc) == (7, 3)


@pytest.mark.parametrize(
    ("line", "nnodes", "endpoint", "run_id", "conf"),
    [
        ("--nnodes 1:4 --rdzv-backend c10d --rdzv-endpoint a:1 --rdzv-id job train.py", "1:4", "a:1", "job", {}),
        ("--nnodes 2 --rdzv-endpoint a:1 train.py", "2", "a:1", "at-a-1", {}),
        ("--nnodes 2 --node-rank 1 --master-addr b --master-port 5 train.py", "2", "b:5", "at-b-5", {"is_host": 0}),
        ("--nnodes 2 --master-addr b train.py", "2", "b:29500", "at-b-29500", {"is_host": 1}),
        (
            "--nnodes 2 --rdzv-endpoint a:1 --rdzv-id j --rdzv-conf join_timeout=5,read_timeout=6 train.py",
            "2",
            "a:1",
            "j",
            {"join_timeout": "5", "read_timeout": "6"},
        ),
        ("--standalone --nnodes 4 --rdzv-id j train.py", "1", "", "j", {}),
    ],
)
def test_rendezvous_settings(line: str, nnodes: str, endpoint: str, run_id: str, conf: dict[str, object]) -> None:
    config = read(line)
    assert (config.nnodes, config.rdzv_endpoint, config.run_id, config.rdzv_conf) == (nnodes, endpoint, run_id, conf)


def test_output_and_time_to_stop() -> None:
    config = read(
        "--log-dir /logs --tee 3 --redirects 0:1 --local-ranks-filter 0,2 --shutdown-timeout 9 --role t train.py"
    )
    assert (config.log_dir, config.tee, config.redirects) == (Path("/logs"), "3", "0:1")
    assert (config.local_ranks_filter, config.stop_grace_s, config.role) == ((0, 2), 9, "t")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--rdzv-backend etcd train.py", "etcd"),
        ("--virtual-local-rank train.py", "--virtual-local-rank is not supported"),
        ("--nnodes 2 --rdzv-backend c10d train.py", "several nodes need a rendezvous"),
        ("--rdzv-conf nonsense train.py", "expected KEY=VALUE"),
    ],
)
def test_unsupported_options(line: str, text: str) -> None:
    if "--virtual-local-rank" in line and "--virtual-local-rank" not in get_args_parser().format_help():
        pytest.skip("torchrun has it since torch 2.10")
    with pytest.raises(OptionsError, match=text):
        read(line)
