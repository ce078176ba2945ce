"""Jobs that are killed again and again, in blocks that alternate between the ways to survive it."""

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
from benchmarks.wire import Desk
from lightning_ckptless import environment
from lightning_ckptless.ledger import read_ledger

STEP_S = 0.05
EVERY = 50
"""Steps between two checkpoint files of the opponent; the kills are spread over them."""
TIMEOUT_S = 120.0
STOCK_TIMEOUT_S = 60.0
ACCOUNT_S = 10.0


@dataclass(frozen=True)
class Opponent:
    """One way to survive a kill.

    Args:
        name: what the tables call it.
        command: makes the command line.
        strategy: of the script.
        checkpoint_every: steps between two checkpoint files; 0 for none.
        env: what it needs beyond the usual.
        ranks: of the job.
        every: steps between two kills, at least.
        strategy_options: of the script's strategy.
        kills_of_a_job: most kills that a job can take; 0 for any number.
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
        """The job that is killed."""
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
    """Torchrun in its own defaults."""
    return Opponent("torchrun as it is, ddp + ModelCheckpoint(50)", with_torchrun, "ddp", EVERY, ranks=ranks)


def files(ranks: int) -> Opponent:
    """Torchrun with a checkpoint file every so many steps, and with the one setting that lets it relaunch."""
    name = f"torchrun, ddp + ModelCheckpoint({EVERY})"
    return Opponent(name, with_torchrun, "ddp", EVERY, tuple(OWN_STORE.items()), ranks=ranks)


@contextmanager
def job(opponent: Opponent, size: str, place: Scratch, name: str) -> Iterator[tuple[Watch, Path]]:
    """A job that is training, and the folder of its runs."""
    folder = place.files / name
    folder.mkdir()
    ours = {environment.RUN_ROOT: str(folder / "runs"), environment.ARENA_DIR: str(place.arenas)}
    with Desk(place.files / f"{name}.socket") as desk:
        env = {**job_environment(desk.path), **ours, **dict(opponent.env)}
        with Command(opponent.command(opponent.options(size, folder)), folder, env) as command:
            yield Watch(desk, command, opponent.ranks), folder


def block(
    opponent: Opponent,
    size: str,
    kills: int,
    place: Scratch,
    name: str,
    chance: random.Random,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Any]:
    """Start a job, kill it so many times, and end it.

    Yields:
        What came of each kill; with the ledger's account of it under `ledger` where there is one.
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
    """So many kills, in as many jobs as that takes: one that is lost, or can take no more, is followed by another.

    Yields:
        As `block` does.
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
    """A recovery is written down when its first step is committed, a moment after it was finished."""
    with suppress(NoRecoveryError):
        watch.until(lambda _: len(recoveries_of(folder)) >= kills, ACCOUNT_S, "the ledger's last recovery")


def recoveries_of(folder: Path) -> list[dict[str, Any]]:
    """The ledger's `recovery` events of the runs in a folder."""
    paths = sorted(folder.rglob("ledger.jsonl"))
    return [event.fields for path in paths for event in read_ledger(path).events if event.event == "recovery"]


def run(args: Any, everybody: tuple[Opponent, ...], progress: Progress) -> dict[str, Any]:
    """Kill every opponent `args.repeats` times, in blocks that alternate; then stock torchrun a few times.

    Args:
        args: the command line.
        everybody: the opponents, of which `args.only` may name some.
        progress: is shown.
    """
    chance = random.Random(args.seed)
    opponents = [opponent for opponent in everybody if not args.only or opponent.name in args.only]
    results: dict[str, list[Any]] = {opponent.name: [] for opponent in opponents}
    untouched, tries = stock(everybody[0].ranks), list[Any]()
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
            progress.update(task, description=untouched.name)
            tried = block(untouched, args.size, 1, place, f"stock-{number}", chance, STOCK_TIMEOUT_S)
            tries += [kill for kill in tried if kill is not None]
            progress.advance(task)
    return {"kills": results, "stock": tries}


def add_options(parser: Any, everybody: tuple[Opponent, ...], repeats: int, block: int) -> None:
    """The options of a program that kills.

    Args:
        parser: of the program.
        everybody: the opponents.
        repeats: kills of each, usually.
        block: kills in a row, usually.
    """
    names = [opponent.name for opponent in everybody]
    parser.add_argument("--repeats", type=int, help=f"kills of each opponent (default: {repeats}; 2 with --quick)")
    parser.add_argument(
        "--block", type=int, default=block, help="kills before the next one's turn (default: %(default)s)"
    )
    parser.add_argument("--stock-tries", type=int, help="kills of torchrun as it is (default: 6; 1 with --quick)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        help="seconds after a kill at which a job is given up as lost (default: %(default)g)",
    )
    parser.add_argument("--size", default="1M", help="model that is trained (default: 1M)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and victims (default: 1)")
    parser.add_argument("--only", nargs="+", choices=names, help="opponents (default: all)")
    parser.set_defaults(usual_repeats=repeats)


def complete(args: Any) -> Any:
    """Fill in what depends on other options."""
    args.repeats = args.repeats or (2 if args.quick else args.usual_repeats)
    args.stock_tries = (1 if args.quick else 6) if args.stock_tries is None else args.stock_tries
    return args
