"""The pages match the code: tables are compared, names are looked up, quoted messages are reproduced."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from types import ModuleType

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from lightning_ckptless import environment, errors, supported
from lightning_ckptless.cli.app import app
from lightning_ckptless.cli.drill import drill
from lightning_ckptless.cli.survey import alarms
from lightning_ckptless.cli.view.metrics import METRICS
from lightning_ckptless.configuration.option import options_of
from lightning_ckptless.errors import OptionsError, WorldSizeError
from lightning_ckptless.membership import drain_events  # noqa: F401 - its events are subclasses
from lightning_ckptless.membership.events import Event
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol import (
    crash_loop,
    draining,
    hang_detection,
    messages,
    node_liveness,
    reconfiguration,
    recovery,
    retry_policy,
    run_end,
    startup,
    stragglers,
)
from lightning_ckptless.protocol.failure_domains import missing_name_error
from lightning_ckptless.protocol.fault_script import GRAMMAR, FaultKind, Moment, parse_faults
from lightning_ckptless.protocol.mtbf import observed_mtbf
from lightning_ckptless.protocol.phases import Phases
from lightning_ckptless.protocol.placement import place
from lightning_ckptless.protocol.placement_table import table_of
from lightning_ckptless.protocol.recovery import WORKER_TRANSITIONS, WorkerEvent
from lightning_ckptless.protocol.repartition import Repartition, require_repartition
from lightning_ckptless.protocol.run_counts import RunCounts
from lightning_ckptless.protocol.slots import TRANSITIONS, SlotEvent
from lightning_ckptless.protocol.startup import Left, Start, StartPlan, plan_start
from lightning_ckptless.protocol.time_account import Bucket, TimeAccount, whole_run
from lightning_ckptless.protocol.versions import Complete, Missing, Replica, SlotState, Version, newest_complete
from lightning_ckptless.protocol.virtual_ranks import require_world
from lightning_ckptless.replica.mirror.mirror import MirrorStats
from lightning_ckptless.supported import SUPPORTED
from lightning_ckptless.trainer.reporting.logged_values import TakenVersion, logged_values
from lightning_ckptless.trainer.strategy.world_size import require_ranks
from tests.house.code import PACKAGE, REPOSITORY, dotted, sources
from tests.house.status_fields import table_text
from tests.versions.legs import USUAL, legs
from tests.versions.table import rows_of

Row = list[str]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
MANUAL = "the model steps its optimizers itself (automatic_optimization=False)"
PATH = re.compile(r"`([a-z_/]+(?:/|\.py))`")
"""A folder or a file of the package, in code format."""
ALL_TEXT = "\n".join(path.read_text() for path in (*PAGES, REPOSITORY / "README.md"))


def page(name: str) -> str:
    """The text of a page."""
    return (REPOSITORY / "docs" / f"{name}.md").read_text()


def flowing(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


def tables(text: str) -> Iterator[list[Row]]:
    """The tables of a page, as rows of cells, without the rule below the head."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def table(text: str, head: str) -> list[Row]:
    """The rows below the head of the table whose first column has this head."""
    return next(rows[1:] for rows in tables(text) if rows[0][0] == head)


def first_words(rows: list[Row]) -> set[str]:
    """The text in code format in the first column."""
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def test_slot_states() -> None:
    head, *rows = next(rows for rows in tables(page("mirroring")) if rows[0][0] == "State")
    events = [SlotEvent(name.strip("`")) for name in head[1:]]
    assert events == list(SlotEvent)
    documented = {
        row[0].strip("`"): {e: cell.strip("`") for e, cell in zip(events, row[1:], strict=True) if cell} for row in rows
    }
    assert documented == {state: dict(edges) for state, edges in TRANSITIONS.items()}


def test_worker_states() -> None:
    head, *rows = next(rows for rows in tables(page("recovery")) if rows[0][0] == "Worker")
    events = [WorkerEvent(name.strip("`")) for name in head[1:]]
    assert set(events) == set(WorkerEvent)
    documented = {
        row[0].strip("`"): {e: cell.strip("`") for e, cell in zip(events, row[1:], strict=True) if cell} for row in rows
    }
    assert documented == {state: dict(edges) for state, edges in WORKER_TRANSITIONS.items()}


@pytest.mark.parametrize(
    ("module", "head"), [(recovery, "Fault"), (hang_detection, "All ranks silent for longer than the limit, and")]
)
def test_cascades(module: ModuleType, head: str) -> None:
    assert module.__doc__ is not None
    assert table(page("recovery"), head) == table(module.__doc__, head)


@pytest.mark.parametrize(
    ("name", "head", "module"),
    [
        ("configuration", "The run", retry_policy),
        ("launching", "The run", run_end),
        ("errors", "The worker ended", crash_loop),
        ("draining", "To be drained", draining),
        ("draining", "A straggler", stragglers),
    ],
)
def test_how_runs_end(name: str, head: str, module: ModuleType) -> None:
    assert module.__doc__ is not None
    assert table(page(name), head) == table(module.__doc__, head)


def test_messages() -> None:
    rows = table(page("development/index"), "Message")
    senders = {
        "worker": messages.WORKER_MESSAGES,
        "sidecar": messages.SIDECAR_MESSAGES,
        "agent": messages.AGENT_MESSAGES,
    }
    classes = [(message.__name__, sender) for sender, group in senders.items() for message in group]
    assert [(row[0].strip("`"), row[1]) for row in rows] == classes
    assert messages.__doc__ is not None
    assert rows == table(messages.__doc__, "Message")
    sent_by = {
        "worker": r"Sent by (a|the first) (worker|survivor|standby)",
        "sidecar": "Sent by the sidecar",
        "agent": "Sent by an agent",
    }
    unsaid = [name for name, sender in classes if not re.match(sent_by[sender], vars(messages)[name].__doc__ or "")]
    assert unsaid == []


def test_status_of_a_run() -> None:
    text = page("watching")
    assert alarms.__doc__ is not None
    assert table(text, "Kind") == table(alarms.__doc__, "Kind")
    assert table_text() in text
    assert table(text, "Metric") == [[f"`{metric.name}`", metric.kind, metric.about] for metric in METRICS]


def test_meaning_of_silence() -> None:
    assert node_liveness.__doc__ is not None
    assert table(page("nodes"), "Seen") == table(node_liveness.__doc__, "Seen")


def test_which_workers_stay_when_nodes_leave_or_join() -> None:
    assert reconfiguration.__doc__ is not None
    assert table(page("elastic"), "Nodes") == table(reconfiguration.__doc__, "Nodes")
    trains = reconfiguration.NodeStatus(trains=True, world_size=8)
    statuses = [replace(trains, node_rank=node) for node in range(3)]
    assert f"{reconfiguration.plan_move(statuses).reason.replace('3 of 3', '3 of 4')}; the world size is 6" in page(
        "elastic"
    )
    assert (
        f"{reconfiguration.plan_move([*statuses, reconfiguration.NodeStatus()]).reason}; the world size is 8"
        in page("elastic")
    )


def test_how_a_run_continues_on_other_ranks() -> None:
    text = page("elastic")
    assert require_world(6, before=8, virtual_ranks=8, obstacle=None) in text
    assert require_world(8, before=6, virtual_ranks=8, obstacle=None) in text
    assert require_repartition(Repartition(4, 60, 36, 3), before=4, per_step=4) in text


def test_runs_that_cannot_continue_on_other_ranks() -> None:
    text = flowing(page("errors"))
    with pytest.raises(WorldSizeError) as refused:
        require_world(3, before=2, virtual_ranks=2, obstacle=None)
    assert str(refused.value) in text
    with pytest.raises(WorldSizeError) as refused:
        require_world(3, before=4, virtual_ranks=4, obstacle=MANUAL)
    assert str(refused.value) in text
    with pytest.raises(OptionsError) as differs:
        require_ranks(nodes=2, per_node=2, found=4, env={environment.NNODES: "1:4"})
    assert str(differs.value) in text
    with pytest.raises(OptionsError) as differs:
        require_ranks(nodes=4, per_node=2, found=4, env={})
    assert str(differs.value) in text


def test_placement_plan() -> None:
    plan = table_of(place(["n0", "n1", "n2", "n3"], 1), [1000, 1_234_000, 999, 0], kind="node")
    assert "\n".join(f"  {line}" for line in plan.lines()) in page("nodes")


def test_missing_failure_domains() -> None:
    error = missing_name_error("rack", "node17", environment.FAILURE_DOMAIN, environment.FAILURE_DOMAINS_FILE)
    assert str(error) in flowing(page("errors"))


def test_start_of_a_generation() -> None:
    assert startup.__doc__ is not None
    assert table(page("recovery"), "Arenas") == table(startup.__doc__, "Arenas")


def test_buckets() -> None:
    text, of_buckets, of_runs = page("goodput"), inspect.getdoc(Bucket), inspect.getdoc(whole_run)
    assert of_buckets is not None and of_runs is not None
    assert table(text, "Bucket") == table(of_buckets, "Bucket")
    assert [row[0].strip("`") for row in table(text, "Bucket")] == list(Bucket)
    assert table(text, "Time") == table(of_runs, "Time")


def test_phases() -> None:
    documented = [row[0].strip("`") for row in table(page("recovery"), "Phase")]
    assert documented == [field.name.removesuffix("_s") for field in fields(Phases)]


def test_environment_variables() -> None:
    ours = {value for name, value in vars(environment).items() if name.isupper() and isinstance(value, str)}
    overriding = {option.about.variable for option in options_of(CkptlessOptions).values()} - {""}
    assert {*environment.SET_BY_USER, *environment.SET_BY_AGENT, *overriding} == ours
    assert set(re.findall(r"CKPTLESS_[A-Z_]+", ALL_TEXT)) <= ours


def test_compatibility() -> None:
    text = page("compatibility")
    ranges = {row[0].split()[0].lower(): (row[1], row[2]) for row in table(text, "")}
    spelled = {
        name.lower(): tuple(".".join(map(str, release)) for release in SUPPORTED[name])
        for name in ("Python", "torch", "lightning")
    }
    assert ranges == spelled
    assert supported.refusal({"torch": "2.7.1"}, ["torch"]) in text
    assert supported.advice({"torch": "2.16.0"}, ["torch"]).split(". ")[0] in text


def test_the_table_of_versions_is_of_legs_that_passed() -> None:
    rows = rows_of(page("compatibility"))
    shown = [(row.python.rpartition(".")[0], row.torch, row.lightning) for row in rows]
    tried = {name: (leg.python, leg.pins["torch"], leg.pins["lightning"]) for name, leg in legs().items()}
    assert [row for row in rows if not row.passed] == []
    assert {tried[name] for name in USUAL} <= set(shown) <= set(tried.values())


def test_the_legs_reach_from_the_lowest_to_the_newest_version() -> None:
    tried = legs()
    for end, name in enumerate(("lowest", "newest")):
        found = {**tried[name].pins, "Python": tried[name].python}
        for library in SUPPORTED:
            assert supported.release(found[library]) == SUPPORTED[library][end]
    assert set(USUAL) <= set(tried)


def test_errors() -> None:
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]
    built_in = {cls.__name__: cls.__bases__[-1].__name__ for cls in classes}
    rows = table(page("errors"), "Exception")
    assert {row[0].strip("`"): row[1].strip("`") for row in rows} == built_in


def test_fault_grammar() -> None:
    text = page("faults")
    assert GRAMMAR in text
    assert [row[0].strip("`") for row in table(text, "Moment")] == list(Moment)
    assert {row[0].strip("`") for row in table(text, "Kind")} == set(FaultKind)


def test_faults_in_the_help_of_the_drill() -> None:
    text = drill.__doc__ or ""
    # A drill has one node.
    assert {kind for kind in FaultKind if not re.search(rf"\b{kind}\b", text)} == {FaultKind.NODE}
    assert re.findall(r"\w+", text.partition("moments: ")[2].partition("\n\n")[0]) == list(Moment)


def test_documented_faults_can_be_parsed() -> None:
    shown = re.findall(r"(?:--fault |CKPTLESS_FAULTS=|FaultInjector\(\")([a-z]+:[^\s\"`]+)", ALL_TEXT)
    assert len(shown) > 5
    for text in shown:
        assert parse_faults(text)


def subclasses(base: type[Event]) -> Iterator[type[Event]]:
    """All kinds of an event."""
    for each in base.__subclasses__():
        yield each
        yield from subclasses(each)


def recorded_events() -> set[str]:
    """Every event in the ledger: those of agents by their classes, the others by the calls that write them."""
    of_agents = {event.name for event in subclasses(Event) if event.name}
    calls = (node for source in sources(PACKAGE) for node in source.nodes if isinstance(node, ast.Call))
    return of_agents | {
        call.args[0].value
        for call in calls
        if dotted(call.func).split(".")[-1] in {"record", "_record"} and call.args
        if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    }


def test_events() -> None:
    assert first_words(table(page("watching"), "Event")) == recorded_events()


def test_logged_values() -> None:
    taken = TakenVersion(0.0, 0.0, MirrorStats())
    values = logged_values(taken, TimeAccount(0.0), observed_mtbf(0, 1.0), None, RunCounts())
    names = {name for name in values if not name.startswith(("recovery_", "time_"))} | {"recovery_s"}
    phases = {f"_{field.name}" for field in fields(Phases)} - {"_detect_s"} | {"ckptless/recovery_detect_s"}
    times = {f"_{bucket}_s" for bucket in Bucket} - {"_start_s"} | {"ckptless/time_start_s"}
    assert first_words(table(page("watching"), "Name")) == {f"ckptless/{name}" for name in names} | phases | times


def test_commands() -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    documented = {name.split()[1] for name in first_words(table(page("watching"), "Command"))}
    assert documented | {"run", "doctor", "drill", "forecast", "rewind"} == set(group.commands)


def test_quoted_messages() -> None:
    two_per_node = [f"node{rank // 2}" for rank in range(8)]
    assert place(two_per_node, 1).reason in page("mirroring")
    with pytest.raises(OptionsError) as refused:
        place([f"node{rank // 4}" for rank in range(8)], 2)
    assert str(refused.value) in page("errors")


def test_quoted_refusals() -> None:
    found = newest_complete([_replica(shard, Version(120, True), world_size=4) for shard in range(4)])
    assert flowing(_plan(found, world_size=3).reason) in flowing(page("errors"))
    lost = newest_complete([_replica(0, Version(118, True), world_size=2)])
    assert flowing(_plan(lost, world_size=2).reason) in flowing(page("errors"))


def _replica(shard: int, version: Version, *, world_size: int) -> Replica:
    return Replica(shard, shard, "node", 0, version, 1, world_size, "layout", SlotState.COMMITTED, 8, 8, "")


def _plan(found: Complete | Missing, *, world_size: int) -> StartPlan:
    start_ = Start(
        generation=2,
        world_size=world_size,
        relaunched=True,
        had_commit=True,
        asked=None,
        origin=None,
        on_unrecoverable="durable",
    )
    return plan_start(start_, found, Left())


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    shown = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", ALL_TEXT))
    assert {"demo", "test"} <= shown <= targets


def test_documented_files_exist() -> None:
    shown = set(
        re.findall(r"\b(?:examples|configs|tests|benchmarks)/[\w./-]+\w|lightning_ckptless/[\w/]+\.py", ALL_TEXT)
    )
    assert len(shown) > 8
    assert {path for path in shown if not (REPOSITORY / path).exists()} == set()


def test_the_map_of_the_code_names_files_that_exist() -> None:
    text = page("development/index")
    named = {name for head in ("Package", "...") for row in table(text, head) for name in PATH.findall(" ".join(row))}
    assert len(named) > 80
    assert {path for path in named if not (REPOSITORY / PACKAGE / path).exists()} == set()


def test_every_folder_of_tests_is_described() -> None:
    described = first_words(table(page("development/index"), "Folder"))
    assert described == {f"tests/{file.parent.name}" for file in (REPOSITORY / "tests").glob("*/*.py")}


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^ +- [\w -]+: ([\w/-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(path.relative_to(REPOSITORY / "docs")) for path in PAGES)
