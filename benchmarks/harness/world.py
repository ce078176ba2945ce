"""Ranks without a trainer: processes of this machine that call a function and return what it has found."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def answers_of(
    ranks: int, work: Callable[..., T], *args: Any, method: Literal["fork", "spawn"] = "spawn", timeout_s: float = 300.0
) -> list[T]:
    """Call `work(rank, *args)` in as many processes, and return the results in the order of ranks.

    No process ends before all have answered, since others may still need it.

    Args:
        ranks: number of processes.
        work: function at the top level of its module.
        args: further arguments.
        method: forked processes start within seconds, spawned ones have an interpreter of their own, as in training.
        timeout_s: longest wait for an answer, in seconds.

    Raises:
        TimeoutError: If a process does not answer in time.
    """
    context: Any = get_context(method)
    pipes = [context.Pipe() for _ in range(ranks)]
    workers = [context.Process(target=_serve, args=(pipe, work, rank, *args)) for rank, (_, pipe) in enumerate(pipes)]
    for worker in workers:
        worker.start()
    try:
        return [_answer(pipe, rank, timeout_s) for rank, (pipe, _) in enumerate(pipes)]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _serve(pipe: Connection, work: Callable[..., Any], rank: int, *args: Any) -> None:
    pipe.send(work(rank, *args))
    pipe.poll(None)  # killed when all have answered


def _answer(pipe: Connection, rank: int, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise TimeoutError(f"rank {rank} has not answered within {timeout_s:g} s")
    return pipe.recv()
