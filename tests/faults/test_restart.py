"""A run that is restarted under the same run id: the content of its arenas determines how it resumes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lightning_ckptless.ledger import Event, read_ledger
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.config import LaunchConfig, Outcome, new_run_id
from lightning_ckptless.membership.launch.launch import run
from lightning_ckptless.membership.worker.program import Program
from lightning_ckptless.protocol.versions import Complete, newest_complete
from lightning_ckptless.replica.arena import Arena, default_arena_dir, find_arenas
from lightning_ckptless.runner import record_for, remove_arenas
from lightning_ckptless.testing.compare import compare
from lightning_ckptless.testing.drill import Variant, run_variant
from lightning_ckptless.testing.log_files import collect_logs
from lightning_ckptless.testing.trace_reader import read_traces
from tests.faults.conftest import REPOSITORY, command_for
from tests.faults.matrix import BASE, is_version
from tests.lab.parts import Options

PER_RANK = replace(BASE, strategy_options="{'failure_domain': 'rank'}")


@dataclass
class Run:
    """A single-node run whose starts share a run id, a folder and the arena."""

    folder: Path
    parent: ForkServer
    run_id: str
    config: LaunchConfig | None = None
    starts: int = 0

    def start(
        self,
        options: Options,
        faults: str = "",
        *,
        max_restarts: int = 0,
        run_root: Path | None = None,
        preemption_notice: str = "",
    ) -> Outcome:
        """Start it and wait for its end; the arena remains."""
        script, *arguments = command_for(options)
        output = self.folder / f"output-{self.starts}"
        self.starts += 1
        self.config = LaunchConfig(
            program=Program("script", script, tuple(arguments)),
            nproc=options.devices,
            run_id=self.run_id,
            max_restarts=max_restarts,
            env={
                "PYTHONPATH": str(REPOSITORY),
                "CKPTLESS_FAULTS": faults,
                "CKPTLESS_TRACE_DIR": str(self.folder / "trace"),
            },
            cwd=self.folder,
            run_root=run_root or self.folder / "runs",
            log_dir=output,
            redirects="3",
            preemption_notice=preemption_notice,
        )
        return run(self.config, parent=self.parent, record=record_for(self.config))

    @property
    def output(self) -> str:
        """The output of the workers of the last start."""
        folder = self.folder / f"output-{self.starts - 1}"
        return "\n".join(path.read_text() for path in sorted(folder.rglob("*.log")))

    @property
    def arena(self) -> Arena:
        """The arena of the run."""
        return Arena.attach(next(info.path for info in find_arenas(default_arena_dir(), self.run_id)))

    def events(self, kind: str) -> list[Event]:
        """Return the ledger events of one kind."""
        return [
            event for event in read_ledger(self.folder / "runs" / self.run_id / "ledger.jsonl") if event.event == kind
        ]


@pytest.fixture
def job(tmp_path: Path, parent: ForkServer) -> Iterator[Run]:
    """A run; its arena is removed at the end."""
    started = Run(tmp_path, parent, new_run_id())
    yield started
    assert started.config is not None
    remove_arenas(started.config)


@pytest.fixture(scope="module")
def undisturbed(parent: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Options], Variant]:
    """Return a function that returns the undisturbed run of a configuration; each runs once."""
    made: dict[Options, Variant] = {}

    def get(options: Options) -> Variant:
        if options not in made:
            made[options] = run_variant(
                command_for(options),
                tmp_path_factory.mktemp("undisturbed") / "run",
                nproc=options.devices,
                parent=parent,
                isolate=True,
                env={"PYTHONPATH": str(REPOSITORY)},
            )
        return made[options]

    return get


def assert_identical(job: Run, undisturbed: Variant) -> None:
    collect_logs(read_traces(job.folder / "trace").values(), job.folder / "logs", since=0)
    verdict = compare(undisturbed.folder, job.folder)
    assert verdict.identical, str(verdict)


def test_a_restart_resumes_from_the_newest_version(job: Run, undisturbed: Callable[[Options], Variant]) -> None:
    assert job.start(BASE, "kill:rank=1:step=5").exit_code == 128 + 9
    assert job.start(BASE).exit_code == 0
    assert [is_version(event.fields["version"], "step 4") for event in job.events("restored")] == [True]
    assert_identical(job, undisturbed(BASE))


def test_a_fault_in_the_start_hooks_of_a_restart_relaunches_all_ranks(
    job: Run, undisturbed: Callable[[Options], Variant], capfd: pytest.CaptureFixture[str]
) -> None:
    """A survivor would train without what the hooks had yet to set up."""
    options, faults = replace(BASE, callback="dying"), "kill:rank=1:step=5"
    assert job.start(options, faults).exit_code == 128 + 9
    outcome = job.start(options, faults, max_restarts=3)
    assert (outcome.exit_code, outcome.restarts, outcome.in_place) == (0, 1, 1)
    assert "before this rank had run the start hooks of `fit`" in capfd.readouterr().err
    assert_identical(job, undisturbed(options))


def test_a_crash_loop_ends_the_run_and_a_restart_resumes_it(
    job: Run, undisturbed: Callable[[Options], Variant], capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = job.start(BASE, "crash:rank=1:step=5:at=backward:times=20", max_restarts=20)
    assert (outcome.exit_code, outcome.has_given_up) == (128 + signal.SIGSEGV, True)
    assert len(outcome.faults) == 4
    assert "rank 1 crashed 4 times in a row at step 5 (SIGSEGV)" in capfd.readouterr().err
    assert job.start(BASE).exit_code == 0
    assert is_version(job.events("restored")[-1].fields["version"], "step 4")
    assert_identical(job, undisturbed(BASE))


def test_a_damaged_shard_is_restored_from_its_replica(job: Run, undisturbed: Callable[[Options], Variant]) -> None:
    job.start(PER_RANK, "kill:rank=0:step=5")
    arena = job.arena
    found = newest_complete(arena.inventory())
    assert isinstance(found, Complete)
    newest = found.snapshot.version
    damaged = next(replica for replica in found.replicas[1] if replica.holder == 1)
    (path,) = arena.path.glob(f"shard-0001.held-by-0001.*slot-{damaged.slot}")
    with path.open("r+b") as file:
        file.seek(4096 + 17)
        byte = file.read(1)
        file.seek(4096 + 17)
        file.write(bytes([byte[0] ^ 1]))
    assert job.start(PER_RANK).exit_code == 0
    assert "1 damaged" in job.output
    assert is_version(job.events("restored")[0].fields["version"], str(newest))
    assert_identical(job, undisturbed(PER_RANK))


def test_shards_of_a_lost_holder_are_restored_from_the_peer(
    job: Run, undisturbed: Callable[[Options], Variant]
) -> None:
    job.start(PER_RANK, "kill:rank=1:step=7")
    for path in job.arena.path.glob("*.held-by-0001.*"):
        path.unlink()
    assert job.start(PER_RANK).exit_code == 0
    assert_identical(job, undisturbed(PER_RANK))


def test_a_shard_without_replicas_ends_the_run_and_is_reported(job: Run) -> None:
    options = replace(BASE, strategy_options="{'failure_domain': 'rank', 'on_unrecoverable': 'raise'}")
    job.start(options, "kill:rank=1:step=7")
    for path in job.arena.path.glob("shard-0001.*"):
        path.unlink()
    assert job.start(options, max_restarts=3).exit_code == 1
    assert job.starts == 2
    assert "StateMissingError" in job.output
    assert "shard 1 of 2" in job.output
    assert "step 6" in job.output or "step 5" in job.output


def test_a_shard_without_replicas_falls_back_to_the_checkpoint_file(job: Run) -> None:
    options = replace(BASE, checkpoint_every=3)
    job.start(options, "kill:rank=1:step=8")
    for path in job.arena.path.glob("shard-0001.*"):
        path.unlink()
    assert job.start(options).exit_code == 0
    assert "resumes from the newest checkpoint file" in job.output
    assert "step=6.ckpt" in job.output


def test_fewer_ranks_are_refused_if_a_rank_cannot_run_two_virtual_ranks(job: Run) -> None:
    own_steps = replace(BASE, optimization="manual")
    job.start(own_steps, "kill:rank=1:step=5")
    outcome = job.start(replace(own_steps, devices=1), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "1 ranks were started for 2 virtual ranks, and a rank cannot run two" in job.output


def test_a_different_model_is_refused_with_the_name_of_a_tensor(job: Run) -> None:
    job.start(BASE, "kill:rank=1:step=5")
    outcome = job.start(replace(BASE, optimization="two"), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "LayoutMismatchError" in job.output
    assert "optimizer/" in job.output


def test_ckpt_path_is_refused_if_the_arena_holds_a_version(job: Run) -> None:
    job.start(BASE, "kill:rank=1:step=5")
    outcome = job.start(replace(BASE, ckpt_path="other.ckpt"), max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "ckpt_path='other.ckpt'" in job.output


def test_a_repeated_exception_is_raised(job: Run) -> None:
    outcome = job.start(replace(BASE, raise_at=5), max_restarts=3)
    assert (outcome.exit_code, outcome.in_place, outcome.restarts) == (1, 1, 0)
    raised = job.events("raised")
    assert [event.fields["final"] for event in raised] == [False, True]
    assert "ValueError: the program's own error at step 5" in job.output
    assert "in training_step" in job.output


@pytest.mark.parametrize("persistent", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.timeout(120)
def test_a_repeated_exception_is_raised_with_dataloader_workers(persistent: bool, job: Run) -> None:
    """Dataloader workers are forks of the rank and hold its open files."""
    outcome = job.start(replace(BASE, raise_at=5, workers=2, persistent=persistent), max_restarts=3)
    assert (outcome.exit_code, outcome.in_place, outcome.restarts) == (1, 1, 0)
    assert [event.fields["final"] for event in job.events("raised")] == [False, True]
    assert "ValueError: the program's own error at step 5" in job.output


def test_training_continues_if_the_ledger_cannot_be_written(job: Run) -> None:
    blocked = job.folder / "a-file"
    blocked.write_text("")
    assert job.start(BASE, run_root=blocked / "runs").exit_code == 0
    assert job.output.count("ledger.jsonl: cannot write, later events will be missing") == 1


def test_an_arena_that_cannot_be_created_is_reported(job: Run) -> None:
    blocked = job.folder / "a-file"
    blocked.write_text("")
    options = replace(BASE, strategy_options=json.dumps({"arena_dir": str(blocked)}))
    outcome = job.start(options, max_restarts=3)
    assert (outcome.exit_code, outcome.restarts) == (1, 0)
    assert "ArenaError" in job.output
    assert str(blocked) in job.output
