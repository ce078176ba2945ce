"""`ckptless drain` sends a request to the agents of a run, and prints the answer."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lightning_ckptless.cli.app import app
from lightning_ckptless.errors import LaunchError, OptionsError
from lightning_ckptless.membership.requests import DrainRequest, Request, Requests
from tests.cli.ledgers import RUN_ID, write_ledger


def invoke(root: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["drain", "--run-root", str(root), *words])


def answered(root: Path, *words: str, accepted: bool, reason: str) -> tuple[Request, Result]:
    """Run the command while an agent answers its request; returns the request and the result."""
    requests = Requests(root / RUN_ID)
    with ThreadPoolExecutor(1) as terminal:
        result = terminal.submit(invoke, root, *words)
        while not (taken := requests.take()):
            assert not result.done(), result.result().output
            threading.Event().wait(0.01)
        taken[0].answer(accepted=accepted, reason=reason)
        return taken[0].request, result.result()


@pytest.mark.parametrize(
    ("words", "request_"),
    [(("--rank", "3"), DrainRequest(rank=3)), ((RUN_ID, "--node", "1"), DrainRequest(node=1))],
)
def test_the_answer_is_printed(words: tuple[str, ...], request_: DrainRequest, tmp_path: Path) -> None:
    write_ledger(tmp_path, ended=False)
    request, result = answered(tmp_path, *words, accepted=True, reason="handed over after step 57")
    assert request == request_
    assert (result.exit_code, result.output) == (0, "handed over after step 57\n")


def test_a_refusal_is_an_error(tmp_path: Path) -> None:
    write_ledger(tmp_path, ended=False)
    _, result = answered(tmp_path, "--node", "0", accepted=False, reason="node 0 is not drained: it is the only one")
    assert isinstance(result.exception, LaunchError)
    assert str(result.exception) == "node 0 is not drained: it is the only one"


@pytest.mark.parametrize("words", [(), ("--rank", "1", "--node", "1")])
def test_either_a_rank_or_a_node_is_drained(words: tuple[str, ...], tmp_path: Path) -> None:
    write_ledger(tmp_path, ended=False)
    result = invoke(tmp_path, *words)
    assert isinstance(result.exception, OptionsError)
    assert "give either --rank R or --node N" in str(result.exception)


def test_a_run_that_has_ended_is_not_asked(tmp_path: Path) -> None:
    write_ledger(tmp_path, ended=True)
    result = invoke(tmp_path, "--rank", "1")
    assert isinstance(result.exception, LaunchError)
    assert str(result.exception) == f"{RUN_ID} has ended: there is nothing to drain"


def test_a_run_without_an_agent_does_not_answer(tmp_path: Path) -> None:
    write_ledger(tmp_path, ended=False)
    result = invoke(tmp_path, "--rank", "1", "--timeout", "0")
    assert isinstance(result.exception, LaunchError)
    assert "no agent of" in str(result.exception)
