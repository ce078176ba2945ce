"""The tables of `steady_state`, from the reports of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.quantiles import fit_line, median
from benchmarks.tables import Table, verdict

FIXED_TARGET_MS = 1.5
STAGING_TARGET = 1.25

Pair = dict[str, Any]
Segment = dict[str, Any]


def step_ms(segment: Segment) -> float:
    """Return the median step of a segment in ms, on the slower rank."""
    return 1e3 * max(median(rank["steps_s"]) for rank in segment["ranks"])


def cpu_ms(segment: Segment) -> float:
    """Return the CPU time of a step in ms: all threads of a rank, mean over steps and ranks."""
    return float(1e3 * segment["cpu_per_step_s"])


def part_ms(segments: list[Segment], name: str) -> float:
    """Return the median of one part of the steps in ms, over ranks and segments; 0 if it was never measured."""
    values = [value for segment in segments for rank in segment["ranks"] for value in rank.get(name, ())]
    return 1e3 * median(values) if values else 0.0


def over_ddp(pair: Pair, variant: str, quantity: Callable[[Segment], float] = step_ms) -> list[float]:
    """Return the difference of a quantity from the neighbouring segment of `ddp`, per round."""
    ours, theirs = pair["segments"][variant], pair["segments"]["ddp"]
    return [quantity(a) - quantity(b) for a, b in zip(ours, theirs, strict=True)]


def main_pairs(results: dict[str, Any]) -> list[Pair]:
    """Return the pairs of `ddp` and `ckptless`, without the comparison of options."""
    return [pair for pair in results["pairs"] if len(pair["segments"]) == 2]


def shard_mb(pair: Pair, variant: str = "ckptless") -> float:
    """Return the megabytes that a rank stages per step."""
    return float(max(rank["staged_bytes"] for rank in pair["segments"][variant][-1]["ranks"]) / 1e6)


def busy_ms(segments: list[Segment], kind: str = "") -> float:
    """Return the time in ms that the training thread spends on a step (capture, pack, hand-over, stamp), without waits.

    Args:
        segments: segments of one variant.
        kind: `cpu_` for CPU time, empty for wall time.
    """
    waits = 0.0 if kind else part_ms(segments, "stall_s")
    return part_ms(segments, f"commit_{kind}s") - waits + part_ms(segments, f"stamp_{kind}s")


def step_table(results: dict[str, Any]) -> Table:
    """Return the table of step times, compared with `ddp`."""
    table = Table(
        "Step time on 2 CPU ranks, one thread each, alternating",
        ("model", "batch", "strategy", "step ms", "over ddp ms", "min to max", "over ddp", "CPU over ddp ms",
         "cores used by others"),
    )  # fmt: skip
    table.note(
        "Step: median of a segment on the slower rank, median over segments. Over ddp: median over rounds of the "
        "difference from the neighbouring segment. CPU: of all threads of a rank, including what a free core would "
        "hide."
    )
    table.note("Cores used by others: by other processes on the machine at that time, median.")
    for pair in results["pairs"]:
        ddp = median([step_ms(segment) for segment in pair["segments"]["ddp"]])
        for name, segments in pair["segments"].items():
            cells: list[str] = ["", "", "", ""]
            if name != "ddp":
                over, cpu = over_ddp(pair, name), median(over_ddp(pair, name, cpu_ms))
                spread = f"{min(over):.2f} to {max(over):.2f}"
                cells = [f"{median(over):.2f}", spread, f"{median(over) / ddp:+.1%}", f"{cpu:.2f}"]
            step = median([step_ms(segment) for segment in segments])
            others = median([segment["cores_used_by_others"] for segment in segments])
            table.add(pair["size"], pair["batch"], name, f"{step:.2f}", *cells, f"{others:.2f}")
    return table


def cost_table(results: dict[str, Any]) -> Table:
    """Return the table of the parts of a mirrored step."""
    table = Table(
        "Parts of a mirrored step, medians in ms",
        ("model", "batch", "strategy", "MB staged", "commit", "commit CPU", "commit wait", "stamp", "wait for copy",
         "mirror CPU", "staged after", "round"),
    )  # fmt: skip
    table.note(
        "Training thread: commit (capture of the host state, hand-over, wait for the previous round), stamp of the "
        "new step, wait for the copy before the optimizer step."
    )
    table.note(
        "Mirror thread: its CPU time per round, and the time from hand-over until the shard is staged and until the "
        "round is committed on all ranks."
    )
    names = ("commit_s", "commit_cpu_s", "stall_s", "stamp_s", "wait_s", "mirror_cpu_s", "stage_s", "round_s")
    for pair in results["pairs"]:
        for variant, segments in pair["segments"].items():
            if variant != "ddp":
                parts = [f"{part_ms(segments, name):.2f}" for name in names]
                table.add(pair["size"], pair["batch"], variant, f"{shard_mb(pair, variant):.1f}", *parts)
    return table


def split_table(results: dict[str, Any]) -> Table:
    """Return the table of the fixed cost and the cost per byte, by a linear fit over the sizes."""
    columns = ("quantity", "fixed ms", "ms per 100 MB of shard")
    table = Table("Fixed part and part per byte, by least squares over the sizes", columns)
    pairs = main_pairs(results)
    if len({pair["size"] for pair in pairs}) < 2:
        return table
    quantities: dict[str, Callable[[Pair], float]] = {
        "step time over ddp": lambda pair: median(over_ddp(pair, "ckptless")),
        "CPU time over ddp, all threads": lambda pair: median(over_ddp(pair, "ckptless", cpu_ms)),
        "training thread, without waits": lambda pair: busy_ms(pair["segments"]["ckptless"]),
        "training thread, CPU": lambda pair: busy_ms(pair["segments"]["ckptless"], "cpu_"),
        "mirror thread, CPU": lambda pair: part_ms(pair["segments"]["ckptless"], "mirror_cpu_s"),
        "hand-over until staged": lambda pair: part_ms(pair["segments"]["ckptless"], "stage_s"),
    }
    for name, quantity in quantities.items():
        line = fit_line([(shard_mb(pair), quantity(pair)) for pair in pairs])
        table.add(name, f"{line.fixed:.2f}", f"{100 * line.slope:.2f}")
    least = min(pairs, key=shard_mb)
    smallest = [pair for pair in pairs if pair["size"] == least["size"]]
    own = max(busy_ms(pair["segments"]["ckptless"]) for pair in smallest)
    whole = max(median(over_ddp(pair, "ckptless")) for pair in smallest)
    table.note(
        f"{least['size']} is {shard_mb(least):.2f} MB per rank, so its cost is the fixed part. Training thread, the "
        f"worse of its batch sizes: {verdict(own, FIXED_TARGET_MS, 'ms')}"
    )
    table.note(f"The same including what the mirror thread takes from it: {verdict(whole, FIXED_TARGET_MS, 'ms')}")
    return table


def staging_table(results: dict[str, Any]) -> Table:
    """Return the table of staging, compared with memcpy."""
    table = Table(
        "Staging the shard of one rank of two, against a plain memcpy into warm shared memory, "
        "alternating in one process",
        ("model", "MB", "pieces", "memcpy ms", "GB/s", "staging ms", "GB/s", "ratio", "over memcpy ms"),
    )
    for row in results["staging"]:
        plain, staged, size = median(row["memcpy_s"]), median(row["stage_s"]), row["shard_bytes"]
        speeds = [f"{size / seconds / 1e9:.1f}" for seconds in (plain, staged)]
        table.add(
            row["size"], f"{size / 1e6:.2f}", row["pieces"], f"{1e3 * plain:.2f}", speeds[0], f"{1e3 * staged:.2f}",
            speeds[1], f"{staged / plain:.2f}", f"{1e3 * (staged - plain):.2f}",
        )  # fmt: skip
        if row["size"] != "tiny":
            table.note(f"{row['size']}: {verdict(staged / plain, STAGING_TARGET, 'x memcpy')}")
    return table


def memory_table(results: dict[str, Any], ranks: int) -> Table:
    """Return the table of bytes in shared memory, compared with the formula."""
    table = Table(
        "Shared memory per rank, against 2 slots x (own shard + kept shards)",
        ("model", "strategy", "state MB", "kept shards", "formula MB", "arena per rank MB", "peak MB", "arena / state"),
    )
    table.note(
        "The formula counts parameters and optimizer state: 2 (1 + m) / N of it for m kept shards and N ranks. On one "
        "node no shards are kept for other ranks unless failure_domain=rank. Peak: while the slots of the first step, "
        "which has no optimizer state yet, still exist.",
    )
    seen = set()
    for pair in results["pairs"]:
        for variant in ("ckptless", "failure_domain=rank"):
            if variant not in pair["segments"] or (pair["size"], variant) in seen:
                continue
            seen.add((pair["size"], variant))
            kept = 1 if variant == "failure_domain=rank" else 0
            state = pair["state_bytes"] / 1e6
            report = pair["segments"][variant][-1]["ranks"][0]
            arena, peak = (report[name] / 1e6 / ranks for name in ("arena_bytes", "peak_arena_bytes"))
            formula = 2 * (1 + kept) / ranks * state
            table.add(
                pair["size"], variant, f"{state:.1f}", kept, f"{formula:.1f}", f"{arena:.1f}", f"{peak:.1f}",
                f"{arena / state:.2f}",
            )  # fmt: skip
    return table
