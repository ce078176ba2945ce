"""Jobs whose ranks are killed repeatedly, in blocks that alternate between the opponents."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.job import JobOptions
from benchmarks.processes import OWN_STORE, Command, job_environment, with_torchrun
from benchmarks.recoveries import NoRecoveryError, Watch, kill_one
from benchmarks.report import console
from benchmarks.scratch import Scratch, scratch
from benchmarks.wire import Inbox
from lightning_ckptless import environment
from lightning_ckptless.ledger import read_ledger

STEP_S = 0.05
EVERY = 50
"""Steps between two checkpoint files of the opponent; kills are spread over that interval."""
TIMEOUT_S = 120.0
STOCK_TIMEOUT_S = 60.0
ACCOUNT_S = 10.0


@dataclass(frozen=True)
class Opponent:
    """One way to survive a kill.

    Args:
        name: name in the tables.
        command: builds the command line.
        strategy: strategy of the script.
        checkpoint_every: steps between two checkpoint files; 0 for none.
        env: additional environment variables.
        ranks: number of ranks.
        every: minimum steps between two kills.
        strategy_options: options of the script's strategy.
        kills_of_a_job: kills after which a job is started again; 0 for no limit.
    """

    name: str
    command: Callable[[JobOptions], list[str]]
    strategy: str = "ckptless"
    checkpoint_every: int = 0
    env: tuple[tuple[str, str], ...] = ()
    ranks: int = 2
    every: int = EVERY
    strategy_options: dict[str, Any] = field(default_factory=dict)
    kills_of_a_job: int = 0

    def options(self, size: str, root: Path) -> JobOptions:
        """Return the options of the job that is killed."""
        return JobOptions(
            size,
            2,
            self.strategy,
            self.strategy_options,
            devices=self.ranks,
            checkpoint_every=self.checkpoint_every,
            root=str(root),
        )


def stock(ranks: int) -> Opponent:
    """Return torchrun with its default settings."""
    return Opponent("torchrun without changes, ddp + ModelCheckpoint(50)", with_torchrun, "ddp", EVERY, ranks=ranks)


def files(ranks: int) -> Opponent:
    """Return torchrun with checkpoint files, and with the setting that makes its relaunches work."""
    name = f"torchrun, ddp + ModelCheckpoint({EVERY})"
    return Opponent(name, with_torchrun, "ddp", EVERY, tuple(OWN_STORE.items()), ranks=ranks)


@contextmanager
def job(opponent: Opponent, size: str, place: Scratch, name: str) -> Iterator[tuple[Watch, Path]]:
    """Start a job; yields its watch and its folder."""
    folder = place.files / name
    folder.mkdir()
    ours = {environment.RUN_ROOT: str(folder / "runs"), environment.ARENA_DIR: str(place.arenas)}
    with Inbox(place.files / f"{name}.socket") as inbox:
        env = {**job_environment(inbox.path), **ours, **dict(opponent.env)}
        with Command(opponent.command(opponent.options(size, folder)), folder, env) as command:
            yield Watch(inbox, command, opponent.ranks), folder


def block(
    opponent: Opponent,
    size: str,
    kills: int,
    place: Scratch,
    name: str,
    chance: random.Random,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Any]:
    """Start a job, kill ranks of it `kills` times, and end it.

    Yields:
        None after each kill; at the end, the result of each kill, with the ledger's `recovery` event under `ledger`.
    """
    found: list[dict[str, Any]] = []
    with job(opponent, size, place, name) as (watch, folder):
        for _ in range(kills):
            try:
                found.append(
                    kill_one(watch, chance, every_n_steps=opponent.every, within_s=STEP_S, timeout_s=timeout_s)
                )
            except NoRecoveryError as error:
                console.print(f"{opponent.name}: {error}", markup=False)
                found.append({"failed": str(error), "victim": error.victim})
            yield None
            if "failed" in found[-1]:
                break
        if opponent.strategy == "ckptless" and "failed" not in found[-1]:
            _await_last_account(watch, folder, sum("failed" not in kill for kill in found))
    accounts = recoveries_of(folder)
    for place_in_order, kill in enumerate(found):
        if place_in_order < len(accounts) and "failed" not in kill:
            kill["ledger"] = accounts[place_in_order]
        yield kill


def jobs(opponent: Opponent, args: Any, kills: int, place: Scratch, name: str, chance: random.Random) -> Iterator[Any]:
    """Kill ranks `kills` times, and start another job when one is lost or has reached its limit.

    Yields:
        The same as `block`.
    """
    done = 0
    while done < kills:
        most, dead = min(kills - done, opponent.kills_of_a_job or kills), False
        for kill in block(opponent, args.size, most, place, f"{name}-{done}", chance, args.timeout):
            if kill is not None:
                done += 1
                dead = "failed" in kill and kill["victim"] is None
            yield kill
        if dead:
            return


def _await_last_account(watch: Watch, folder: Path, kills: int) -> None:
    """Wait for the ledger: a recovery is recorded when its first step is committed, shortly after it is finished."""
    with suppress(NoRecoveryError):
        watch.until(lambda _: len(recoveries_of(folder)) >= kills, ACCOUNT_S, "the ledger's last recovery")


def recoveries_of(folder: Path) -> list[dict[str, Any]]:
    """Return the fields of the `recovery` events in the ledgers of a folder."""
    paths = sorted(folder.rglob("ledger.jsonl"))
    return [event.fields for path in paths for event in read_ledger(path).events if event.event == "recovery"]


def run(args: Any, all_opponents: tuple[Opponent, ...], progress: Progress) -> dict[str, Any]:
    """Kill every opponent `args.repeats` times, in alternating blocks; then torchrun without changes a few times.

    Args:
        args: options of the command line.
        all_opponents: the opponents; `args.only` may select some of them.
        progress: progress display.
    """
    chance = random.Random(args.seed)
    opponents = [opponent for opponent in all_opponents if not args.only or opponent.name in args.only]
    results: dict[str, list[Any]] = {opponent.name: [] for opponent in opponents}
    stock_torchrun, tries = stock(all_opponents[0].ranks), list[Any]()
    task = progress.add_task("", total=len(opponents) * args.repeats + args.stock_tries)
    with scratch() as place:
        blocks = [min(args.block, args.repeats - done) for done in range(0, args.repeats, args.block)]
        for number, kills in enumerate(blocks):
            for index, opponent in enumerate(opponents):
                progress.update(task, description=opponent.name)
                for kill in jobs(opponent, args, kills, place, f"{index}-{number}", chance):
                    if kill is None:
                        progress.advance(task)
                    else:
                        results[opponent.name].append(kill)
        for number in range(args.stock_tries):
            progress.update(task, description=stock_torchrun.name)
            tried = block(stock_torchrun, args.size, 1, place, f"stock-{number}", chance, STOCK_TIMEOUT_S)
            tries += [kill for kill in tried if kill is not None]
            progress.advance(task)
    return {"kills": results, "stock": tries}


def add_options(parser: Any, all_opponents: tuple[Opponent, ...], repeats: int, block: int) -> None:
    """Add the options of a program that kills ranks.

    Args:
        parser: parser of the program.
        all_opponents: the opponents.
        repeats: default number of kills of each opponent.
        block: default number of consecutive kills.
    """
    names = [opponent.name for opponent in all_opponents]
    parser.add_argument("--repeats", type=int, help=f"kills of each opponent (default: {repeats}; 2 with --quick)")
    parser.add_argument(
        "--block", type=int, default=block, help="consecutive kills of an opponent (default: %(default)s)"
    )
    parser.add_argument(
        "--stock-tries", type=int, help="kills of torchrun without changes (default: 6; 1 with --quick)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        help="seconds after a kill until a job counts as lost (default: %(default)g)",
    )
    parser.add_argument("--size", default="1M", help="model size (default: 1M)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments and victims (default: 1)")
    parser.add_argument("--only", nargs="+", choices=names, help="opponents (default: all)")
    parser.set_defaults(default_repeats=repeats)


def complete(args: Any) -> Any:
    """Fill in the defaults that depend on other options."""
    args.repeats = args.repeats or (2 if args.quick else args.default_repeats)
    args.stock_tries = (1 if args.quick else 6) if args.stock_tries is None else args.stock_tries
    return args
