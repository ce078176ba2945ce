import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import recovery, rivals
from benchmarks.harness.processes import ROOT
from benchmarks.harness.scenario import Scenario
from benchmarks.jobs.gpt import GPT, Batches, fingerprint, random_tokens
from benchmarks.jobs.job import JobOptions
from benchmarks.recovery import RIVALS, Recovery, jobs, reference_of, rivals_in
from benchmarks.rivals.supervisor import free_port

PYTHON = Path("/rivals/bin/python")
NVRX_JOB, TORCHFT_JOB = rivals_in(PYTHON)
NVRX, TORCHFT = RIVALS


def test_the_batches_of_an_epoch_are_shared_by_the_ranks() -> None:
    shares = [Batches(24, 2, rank, 3) for rank in range(3)]

    epoch = torch.cat([share.at(step) for step in range(4) for share in shares])
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, random_tokens(24).tolist()))


def test_a_step_has_the_same_batch_at_every_call() -> None:
    first, second = Batches(24, 2, 1, 3), Batches(24, 2, 1, 3)
    ahead = [first.at(step) for step in range(9)]

    assert all(torch.equal(second.at(step), ahead[step]) for step in (8, 0, 5))
    assert not torch.equal(ahead[0], ahead[4])


def trained(steps: int, lr: float) -> int:
    torch.manual_seed(3)
    model = GPT("tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(random_tokens(2)).backward()
        optimizer.step()
    return fingerprint(model, optimizer)


def test_fingerprints_distinguish_runs() -> None:
    assert trained(2, 1e-4) == trained(2, 1e-4)
    assert len({trained(2, 1e-4), trained(1, 1e-4), trained(2, 1.001e-4)}) == 3


def test_a_trainer_is_compared_with_ddp_and_a_loop_with_itself() -> None:
    references = [reference_of(opponent) for opponent in (*recovery.SCENARIOS, NVRX_JOB)]

    assert {(reference.job.strategy, reference.job.checkpoint_every) for reference in references} == {("ddp", 0)}
    assert reference_of(TORCHFT_JOB) is TORCHFT_JOB


def kill(**fields: Any) -> dict[str, Any]:
    return {"victim": 1, "seconds": 1.0, "repeated_steps": 0, "lost_committed_steps": 0, "step_s": 0.1, **fields}


def test_the_table_shows_exactness_and_survived_kills_of_rank_0() -> None:
    kills = {
        NVRX: [kill(exact=False), kill(exact=True), {"failed": "no sign", "victim": 0}],
        TORCHFT: [{"failed": "no sign", "victim": 0}],
    }
    table, _ = Recovery().tables({"kills": kills, "rivals": {"torchft": "0.2.0"}})

    place = table.columns.index("exact")
    assert [row[place] for row in table.rows] == ["1 of 2", ""]
    assert [row[-1] for row in table.rows] == ["0 of 1", "0 of 1"]
    assert table.notes[-1] == "Other tools: torchft 0.2.0."


@pytest.mark.parametrize(("of_a_job", "lost", "expected"), [(0, (), [5]), (2, (), [2, 2, 1]), (0, (2,), [5, 2])])
def test_a_lost_job_is_followed_by_another(
    of_a_job: int, lost: tuple[int, ...], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, found = run_jobs(of_a_job, [*lost], 1, monkeypatch)

    assert started == expected
    assert len(found) == 5


def test_a_job_that_does_not_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_jobs(0, [0], None, monkeypatch) == ([5], [{"failed": "", "victim": None}])


def run_jobs(
    of_a_job: int, lost: list[int], victim: int | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[Any]]:
    """The kills that each job was started for, and what came of five, where a job is lost after so many."""
    started: list[int] = []

    def kill_repeatedly(watch: Any, folder: Any, scenario: Any, kills: int, *_: Any) -> list[Any]:
        survives = lost[len(started)] if len(started) < len(lost) else kills
        started.append(kills)
        return [{} for _ in range(survives)] + [{"failed": "", "victim": victim}] * (survives < kills)

    monkeypatch.setattr("benchmarks.recovery.running", lambda *_, **__: nullcontext((None, None)))
    monkeypatch.setattr("benchmarks.recovery.kill_repeatedly", kill_repeatedly)
    scenario = Scenario("one", lambda _: [], kills_of_a_job=of_a_job)
    return started, jobs(scenario, "1M", 5, None, "name", None)  # type: ignore[arg-type]


def test_without_their_environment_the_rivals_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rivals.versions(tmp_path / "python") == {}
    assert "does not exist: `make bench-rivals` sets it up" in capsys.readouterr().out
    assert rivals.versions(Path(sys.executable)) == {}
    assert "lacks a package" in capsys.readouterr().out


def test_the_versions_of_the_rivals_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "PACKAGES", ("torch",))
    assert rivals.versions(Path(sys.executable)) == {"torch": torch.__version__}


def test_the_command_line_of_a_rival_names_its_python_and_its_job() -> None:
    line = NVRX_JOB.command(NVRX_JOB.job)

    assert line[:3] == [str(PYTHON), "-m", "benchmarks.rivals.supervisor"]
    assert JobOptions.from_arguments(line[3:]).strategy == "nvrx"


def test_a_lost_process_is_restarted(tmp_path: Path) -> None:
    script = """
import os, signal, sys
runs = open(sys.argv[1] + os.environ["RANK"], "a+")
print(os.environ["WORLD_SIZE"], file=runs, flush=True)
runs.seek(0)
if os.environ["RANK"] == "1" and len(runs.readlines()) < 3:
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1":
    os.kill(os.getppid(), signal.SIGINT)
signal.pause()
"""
    done = supervised([sys.executable, "-c", script, f"{tmp_path}/"], again=True)
    assert done.returncode == -signal.SIGINT
    assert (tmp_path / "1").read_text() == "2\n" * 3


def test_a_job_ends_with_its_processes() -> None:
    assert supervised([sys.executable, "-c", "pass"], again=False).returncode == 0


def supervised(words: list[str], *, again: bool) -> subprocess.CompletedProcess[bytes]:
    """Supervise two ranks in a process of its own: it waits for any child, and ends all that it has."""
    code = f"from benchmarks.rivals.supervisor import supervise; supervise({words!r}, 2, {{}}, again={again})"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)


def test_ports_are_free() -> None:
    assert free_port() != free_port()


def test_the_environment_is_described() -> None:
    text = (ROOT / "benchmarks" / "rivals" / "constraints.txt").read_text()
    assert {"torchft", "nvidia-resiliency-ext"} <= set(re.findall(r"^([\w-]+)==", text, re.MULTILINE))
