"""The verdict of each check of the doctor on given facts."""

from __future__ import annotations

import resource
import threading
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_ckptless import environment
from lightning_ckptless.cli.checks import clock, limits, network, processes, space, variables, versions
from lightning_ckptless.cli.checks.check import Check, Job, State, Status
from lightning_ckptless.cli.checks.clock import Instant
from lightning_ckptless.cli.checks.network import HostName
from lightning_ckptless.cli.checks.processes import Watched
from lightning_ckptless.durable.folder import DurableFolder
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.worker.nccl import ENDS_THE_PROCESS
from lightning_ckptless.supported import SUPPORTED, Range
from lightning_ckptless.system.control_groups import Ceiling

OK, WARNING, FAILURE = Status.OK, Status.WARNING, Status.FAILURE
GB = 10**9
ADAM = State.of_parameters(10**9, 2)
ONE, TWO = Job(ranks=4), Job(ranks=4, nodes=2)


def arena_folder(free_bytes: int, *, in_memory: bool = True, problem: str = "") -> space.ArenaFolder:
    return space.ArenaFolder(Path("/memory"), 2 * free_bytes, free_bytes, in_memory, problem)


def advises(check: Check, status: Status, fix: str) -> bool:
    return check.status is status and fix in check.fix


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize("found", ["2.8.0", "2.8.0a0+5228986c39.nv25.06", "2.9.1+cpu", "2.10"])
def test_versions_in_range(found: str) -> None:
    assert versions.check_version("torch", found, Range((2, 8), (2, 10))).status is OK


@pytest.mark.parametrize("found", ["2.7.1", None])
def test_versions_below_the_range(found: str | None) -> None:
    check = versions.check_version("torch", found, Range((2, 8), (2, 10)))
    assert advises(check, FAILURE, "pip install 'torch>=2.8'") and check.expected == "2.8 to 2.10"


def test_versions_above_the_range() -> None:
    assert advises(versions.check_version("torch", "2.11.0", Range((2, 8), (2, 10))), WARNING, "ckptless drill")


def test_either_lightning_is_enough() -> None:
    found = {name: ".".join(map(str, lowest)) for name, (lowest, _) in SUPPORTED.items()}
    one = {name: text for name, text in found.items() if name != "lightning"}
    assert [check.name for check in versions.check_versions(one)] == ["Python", "torch", "pytorch-lightning"]
    none = versions.check_versions({"Python": found["Python"], "torch": found["torch"]})
    assert [check.name for check in none if check.status is FAILURE] == ["lightning"]


def test_installed_versions_are_found() -> None:
    installed = {check.name: check.found for check in versions.check_versions()}
    assert installed["torch"].startswith(version("torch"))


# ---------------------------------------------------------------- space


@pytest.mark.parametrize(
    ("job", "needed"),
    [
        # Two slots of 12 bytes per parameter, plus those of the first step with 4 bytes per parameter.
        (Job(4, state=ADAM), 32 * GB),
        (Job(4, failure_domain="rank", state=ADAM), 64 * GB),
        (Job(4, nodes=2, state=ADAM), 32 * GB),
        (Job(4, nodes=4, copies=2, state=ADAM), 24 * GB),
        (Job(4, nodes=4, copies=0, state=State.of_parameters(10**9, 0)), 4 * GB),
    ],
)
def test_room_for_arenas(job: Job, needed: int) -> None:
    assert space.check_arena_space(job, arena_folder(needed)).status is OK
    small = arena_folder(needed - 1)
    # If the folder is in memory, the agent holds the slots that do not fit; on a disk that is not possible.
    assert advises(space.check_arena_space(job, small), WARNING, f"--shm-size {needed // GB}g")
    refused = space.check_arena_space(job, replace(small, in_memory=False))
    assert advises(refused, FAILURE, f"--shm-size {needed // GB}g")
    assert refused.expected.startswith(f"{needed / GB:.1f} GB")


def test_room_for_a_model_of_unknown_size() -> None:
    found = space.check_arena_space(ONE, arena_folder(64 * GB))
    assert found.status is OK and "2.0B parameters" in found.found


def test_arena_folder() -> None:
    assert space.check_arena_folder(arena_folder(1)).status is OK
    assert advises(space.check_arena_folder(arena_folder(1, in_memory=False)), WARNING, "mount a tmpfs")
    assert advises(space.check_arena_folder(arena_folder(1, problem="no")), FAILURE, "CKPTLESS_ARENA_DIR")


def test_an_arena_folder_need_not_exist(tmp_path: Path) -> None:
    found = space.inspect_folder(tmp_path / "a" / "b")
    assert not found.problem and found.free_bytes > 0 and not (tmp_path / "a").exists()


def test_copies_need_failure_domains() -> None:
    assert space.check_placement(ONE).status is OK
    assert "not covered" in space.check_placement(ONE).found
    assert advises(space.check_placement(Job(4, nodes=2, copies=2)), FAILURE, "set copies=1")


def test_durable_folder(tmp_path: Path) -> None:
    job = Job(4, state=State.of_parameters(1, 2))
    DurableFolder(earlier := tmp_path / "earlier").prepare()
    for folder in (tmp_path / "missing" / "too", earlier):
        assert space.check_durable_folder(job, folder).status is OK
    assert not (tmp_path / "missing").exists()
    (tmp_path / "mine").touch()
    assert advises(space.check_durable_folder(job, tmp_path), FAILURE, "to another folder")
    much = Job(4, state=State.of_parameters(10**18, 2))
    assert advises(space.check_durable_folder(much, earlier), FAILURE, "larger file system")


# ---------------------------------------------------------------- limits


def test_open_files() -> None:
    assert limits.check_descriptors(ONE, resource.RLIM_INFINITY).status is OK
    assert limits.check_descriptors(ONE, 1024).status is OK
    assert advises(limits.check_descriptors(Job(8, nodes=32), 1024), FAILURE, "ulimit -n 4096")
    assert advises(limits.check_descriptors(Job(8, nodes=16), 1024), WARNING, "ulimit -n 4096")


def test_file_size() -> None:
    of_3_gb = Job(4, state=ADAM)
    assert limits.check_file_size(of_3_gb, 3 * GB).status is OK
    assert advises(limits.check_file_size(of_3_gb, 3 * GB - 1), FAILURE, "ulimit -f")
    assert limits.check_file_size(ONE, 1).status is WARNING
    assert limits.check_file_size(ONE, resource.RLIM_INFINITY).status is OK


def test_locked_memory() -> None:
    assert limits.check_locked_memory(65536, 0).status is OK
    assert limits.check_locked_memory(resource.RLIM_INFINITY, 2).status is OK
    assert advises(limits.check_locked_memory(65536, 2), WARNING, "ulimit -l")


def test_processes() -> None:
    unlimited = resource.RLIM_INFINITY
    assert limits.check_processes(ONE, unlimited, None, 5).found == "unlimited"
    group = Ceiling(100, 90, Path("group"))
    assert "control group limit 100, 90 in use" in limits.check_processes(ONE, 4096, group, 5).found
    assert advises(limits.check_processes(ONE, 4096, group, 5), FAILURE, "--pids-limit")
    assert limits.check_processes(ONE, 100, None, 90).status is FAILURE
    assert limits.check_processes(ONE, 190, None, 90).status is WARNING
    assert limits.check_processes(ONE, 4096, None, 90).status is OK


@pytest.mark.parametrize(
    ("job", "needed"),
    [
        # 24 GB for arenas, and 16 bytes per parameter for each rank that trains on a CPU.
        (Job(4, state=ADAM), 24 * GB + 4 * 16 * GB),
        (Job(4, state=ADAM, is_sharded=True), 24 * GB + 16 * GB),
        (Job(4, state=ADAM, has_gpu=True), 24 * GB),
    ],
)
def test_memory(job: Job, needed: int) -> None:
    assert limits.check_memory(job, needed, None, arenas_in_memory=True).status is OK
    assert limits.check_memory(job, needed - 1, None, arenas_in_memory=True).status is FAILURE
    assert limits.check_memory(job, needed - 1, None, arenas_in_memory=False).status is OK
    group = Ceiling(2 * needed, needed + 1, Path("group"))
    found = limits.check_memory(job, 9 * needed, group, arenas_in_memory=True)
    assert found.status is FAILURE and "control group" in found.found


# ---------------------------------------------------------------- processes, clock


def test_the_exit_of_a_process_is_observed() -> None:
    watched = processes.watch_a_process()
    assert not watched.pidfd_problem and not watched.proc_problem
    assert processes.check_pidfd(watched).status is OK and processes.check_proc(watched).status is OK


def test_processes_that_cannot_be_watched_are_a_failure() -> None:
    assert advises(processes.check_pidfd(Watched(pidfd_problem="pidfd_open: EPERM")), FAILURE, "seccomp")
    assert advises(processes.check_proc(Watched(proc_problem="none")), FAILURE, "mount /proc")
    assert "ptrace_scope 1 (own children)" in processes.check_proc(Watched(ptrace_scope="1")).found


def test_clock_jumps() -> None:
    began = Instant(1000.0, 10.0)
    assert clock.check_jumps(began, Instant(1002.1, 12.0)).status is OK
    assert advises(clock.check_jumps(began, Instant(1005.0, 12.0)), WARNING, "slew the clock")
    assert advises(clock.check_jumps(began, Instant(995.0, 12.0)), WARNING, "slew the clock")
    assert clock.check_jumps(began, Instant(1002.0, 9.0)).status is FAILURE


def test_clock_synchronization() -> None:
    assert clock.is_synchronized() in {True, False, None}
    assert clock.check_synchronized(ONE, synchronized=False).status is OK
    assert clock.check_synchronized(TWO, synchronized=True).status is OK
    assert advises(clock.check_synchronized(TWO, synchronized=False), WARNING, "chrony")


# ---------------------------------------------------------------- network, variables


def test_host_name() -> None:
    nameless = HostName("box", (), 0.0, "no such name")
    assert advises(network.check_host_name(ONE, nameless, {}), WARNING, "/etc/hosts")
    assert network.check_host_name(TWO, nameless, {}).status is FAILURE
    alone = HostName("box", ("127.0.1.1",), 0.0)
    assert network.check_host_name(ONE, alone, {}).status is OK
    assert advises(network.check_host_name(TWO, alone, {}), FAILURE, "GLOO_SOCKET_IFNAME")
    assert network.check_host_name(TWO, alone, {"GLOO_SOCKET_IFNAME": "eth0"}).status is OK
    assert network.check_host_name(TWO, HostName("box", ("10.0.0.7", "fe80::1%eth0"), 0.0), {}).status is OK


def test_localhost_resolves() -> None:
    found = network.look_up("localhost")
    assert {"127.0.0.1", "::1"} & set(found.addresses) and not found.problem


def test_a_failed_look_up_is_reported() -> None:
    def refuse(name: str) -> tuple[str, ...]:
        raise OSError(f"{name} is not known")

    assert network.look_up("box", refuse).problem == "box is not known"


def test_a_look_up_without_an_answer_times_out() -> None:
    answer = threading.Event()

    def wait(name: str) -> tuple[str, ...]:
        answer.wait()
        return (name,)

    found = network.look_up("10.0.0.7", wait, limit_s=0.05)
    answer.set()
    assert found.problem == "no answer within 0.05 s" and found.longest_s == 0.05


def test_a_slow_look_up_is_a_warning() -> None:
    assert network.check_look_up_time(HostName("box", ("10.0.0.7",), 0.02)).status is OK
    slow = network.check_look_up_time(HostName("box", ("10.0.0.7",), 5.01))
    assert advises(slow, WARNING, "resolv.conf") and "5010 ms" in slow.found


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("GLOO_SOCKET_IFNAME", None, OK),
        ("GLOO_SOCKET_IFNAME", "eth0", OK),
        ("GLOO_SOCKET_IFNAME", "eth", FAILURE),
        ("GLOO_SOCKET_IFNAME", "ib0", FAILURE),
        ("GLOO_SOCKET_IFNAME", "lo", FAILURE),
        ("NCCL_SOCKET_IFNAME", "eth", OK),
        ("NCCL_SOCKET_IFNAME", "=eth", FAILURE),
        ("NCCL_SOCKET_IFNAME", "=eth0", OK),
        ("NCCL_SOCKET_IFNAME", "^eth,lo", FAILURE),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", OK),
        ("NCCL_SOCKET_IFNAME", "bond,eth", OK),
    ],
)
def test_interfaces(variable: str, value: str | None, status: Status) -> None:
    interfaces = {"lo": True, "eth0": True, "ib0": False}
    on_gpus = Job(4, nodes=2, has_gpu=True)
    assert network.check_interface(on_gpus, variable, value, interfaces).status is status


def test_loopback_is_enough_on_one_node() -> None:
    assert network.check_interface(ONE, "GLOO_SOCKET_IFNAME", "lo", {"lo": True}).status is OK


def test_an_interface_of_nccl_without_gpus_is_a_warning() -> None:
    assert network.check_interface(ONE, "NCCL_SOCKET_IFNAME", "ib0", {"lo": True}).status is WARNING


@pytest.mark.parametrize("variable", ENDS_THE_PROCESS)
def test_nccl_variables(variable: str) -> None:
    assert variables.check_nccl({variable: "0"}).status is OK
    assert advises(variables.check_nccl({variable: "1"}), WARNING, f"unset {variable}")


def test_older_nccl_names_have_no_effect() -> None:
    found = variables.check_nccl({"NCCL_ASYNC_ERROR_HANDLING": "1"})
    assert found.status is OK and "NCCL_ASYNC_ERROR_HANDLING" in found.found


def test_autoload() -> None:
    assert variables.check_autoload({}).status is OK
    found = variables.check_autoload({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert advises(found, WARNING, "import lightning_ckptless")


def test_our_variables() -> None:
    assert variables.check_ours({environment.RUN_ROOT: "runs", "HOME": "/"}).status is OK
    assert advises(
        variables.check_ours({environment.RUN_ROOT + "S": "runs"}), WARNING, "did you mean CKPTLESS_RUN_ROOT?"
    )
    assert advises(variables.check_ours({environment.FAULTS: "kill:rank=1:step=7"}), WARNING, "unset CKPTLESS_FAULTS")


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "count"),
    [("1000", 1000), ("7e9", 7 * 10**9), ("1.5B", 1_500_000_000), ("300m", 3 * 10**8), ("1_000K", 10**6)],
)
def test_parameter_counts_are_parsed(text: str, count: int) -> None:
    from lightning_ckptless.cli.doctor import parse_count

    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "-1", "1X", "1e999"])
def test_an_invalid_parameter_count_is_refused(text: str) -> None:
    from lightning_ckptless.cli.doctor import parse_count

    with pytest.raises(OptionsError, match=r"expected a number, e\.g\. 7e9"):
        parse_count(text)


def test_visible_gpus_are_counted(tmp_path: Path) -> None:
    from lightning_ckptless.cli.doctor import visible_gpus

    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == visible_gpus({}, tmp_path / "none") == 0
