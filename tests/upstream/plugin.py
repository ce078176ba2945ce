"""A pytest plugin that runs Lightning's tests with a given strategy and records the outcome of each test.

Where Lightning would train on one CPU device, with or without DDP, the strategy given on the command line is used
instead. Everything else is the same in both runs. Every test has the environment of a worker of its own agent, because
unlike the process of a script, the process of a test cannot be replaced by an agent.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from lightning_ckptless import environment
from lightning_ckptless.lightning_pytorch import CkptlessStrategy
from lightning_ckptless.trainer.strategy import launcher
from tests.upstream.runs import STRATEGIES, StrategyName

DDP_NAMES = {"ddp": {}, "ddp_find_unused_parameters_true": {"find_unused_parameters": True}}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options for the strategy, the selection of tests and the record."""
    group = parser.getgroup("upstream")
    group.addoption("--forced-strategy", choices=STRATEGIES, required=True, help="strategy to train with")
    group.addoption("--record", type=Path, required=True, help="file that receives a line when a test starts and ends")
    group.addoption("--only", type=Path, help="file with the ids of the tests to run, one per line")
    group.addoption("--except", type=Path, dest="excluded", help="file with the ids of tests not to run, one per line")


def pytest_configure(config: pytest.Config) -> None:
    """Force the strategy from now on; register a marker of another plugin that Lightning's tests use."""
    config.addinivalue_line("markers", "flaky(reruns): may be run several times")
    config.pluginmanager.register(Upstream(config.option.forced_strategy, config.option.record))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that are not to be run."""
    if config.option.only is not None:
        only = set(config.option.only.read_text().splitlines())
        items[:] = [item for item in items if item.nodeid in only]
    if config.option.excluded is not None:
        excluded = set(config.option.excluded.read_text().splitlines())
        items[:] = [item for item in items if item.nodeid not in excluded]


class Upstream:
    """Forces the strategy and records outcomes.

    Args:
        name: name of the strategy to train with.
        record: file to which outcomes are appended.
    """

    def __init__(self, name: StrategyName, record: Path) -> None:
        self._name = name
        self._record = record
        self._worker: dict[str, str] = {}
        self._forced = 0
        self._report: dict[str, str] = {}
        self._replace_methods()

    def _replace_methods(self) -> None:
        """Patch Lightning's choice of the strategy, for the lifetime of this process, which runs nothing else."""
        plugin, connector = self, _AcceleratorConnector
        own_init, own_choice = connector.__init__, connector._init_strategy

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            # Some tests clear the environment.
            for name, value in plugin._worker.items():
                os.environ.setdefault(name, value)
            own_init(self, *args, **kwargs)

        def choose(self: Any) -> None:
            if starts_processes(self):
                pytest.skip("needs several processes")
            if trains_on_one_cpu(self):
                plugin._forced += 1
                self._strategy_flag = make_strategy(plugin._name, self._strategy_flag)
            own_choice(self)

        connector.__init__ = init  # type: ignore[method-assign]
        connector._init_strategy = choose  # type: ignore[method-assign]
        launcher.replace_by_agent = refuse_to_be_replaced  # type: ignore[attr-defined]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run one test in the environment of a worker; record its start and its outcome."""
        self._forced, self._report = 0, {"result": "not run"}
        began_at = time.monotonic()
        self._write(began=item.nodeid)
        with worker_environment() as self._worker:
            result = yield
        seconds = round(time.monotonic() - began_at, 2)
        self._write(ended=item.nodeid, trainers=self._forced, seconds=seconds, **self._report)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the report of the first failed phase, or of the call if no phase failed."""
        if self._report["result"] == "failed" or (report.passed and report.when != "call"):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        self._report = {
            "result": report.outcome,
            "message": "" if crash is None else str(crash.message)[:2000],
            "place": "" if crash is None else f"{Path(crash.path).name}:{crash.lineno}",
        }

    def _write(self, **fields: object) -> None:
        with self._record.open("a") as file:
            file.write(json.dumps(fields) + "\n")


def trains_on_one_cpu(connector: Any) -> bool:
    """Whether Lightning is about to train on a single CPU device, with DDP or with the single-device strategy."""
    flag = connector._strategy_flag
    return isinstance(connector.accelerator, CPUAccelerator) and (
        type(flag) is SingleDeviceStrategy or (isinstance(flag, str) and flag in DDP_NAMES)
    )


def starts_processes(connector: Any) -> bool:
    """Whether Lightning is about to start processes for training on the CPU, which would take too long."""
    if not isinstance(connector.accelerator, CPUAccelerator):
        return False
    flag = connector._strategy_flag
    is_launcher = isinstance(flag, str) and flag.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook"))
    return is_launcher or connector._num_nodes_flag > 1 or len(connector._parallel_devices) > 1


def make_strategy(name: StrategyName, asked: object) -> Any:
    """Create the strategy to train with.

    Args:
        name: name of the forced strategy.
        asked: the strategy that the test asked for.
    """
    options: Mapping[str, Any] = DDP_NAMES.get(asked, {}) if isinstance(asked, str) else {}
    if name == "ddp":
        return DDPStrategy(**options)
    return CkptlessStrategy(**options)


def refuse_to_be_replaced(**_: object) -> NoReturn:
    """Raise instead of replacing the process by an agent, which would end all tests."""
    raise RuntimeError("this test has removed the variables of its worker: the process would be replaced by an agent")


@contextmanager
def worker_environment() -> Iterator[dict[str, str]]:
    """Set up a fresh environment of the only worker of an agent.

    It includes the variables that a worker sets itself, because Lightning's tests fail if a new variable remains.
    """
    before = dict(os.environ)
    folder = Path(tempfile.mkdtemp(prefix="ckptless-upstream-"))
    for name in ("arenas", "agent", "runs"):
        (folder / name).mkdir()
    variables = {
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex[:12],
        "TORCHELASTIC_RESTART_COUNT": "0",
        # A test cannot be restarted, so its exceptions must be raised the first time.
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        environment.AGENT: str(os.getpid()),
        environment.NODE: "upstream",
        environment.ARENA_DIR: str(folder / "arenas"),
        environment.AGENT_DIR: str(folder / "agent"),
        environment.RUN_ROOT: str(folder / "runs"),
        environment.GENERATION: "0",
        environment.FIT_INDEX: "0",
        environment.CALLS: "0",
    }
    os.environ.update(variables)
    try:
        yield variables
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
