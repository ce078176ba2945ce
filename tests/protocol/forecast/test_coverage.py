"""The losses that memory covers are those of the placement of the protocol."""

from __future__ import annotations

from itertools import combinations

import pytest

from lightning_ckptless.protocol.forecast.coverage import Coverage, domains_error
from lightning_ckptless.protocol.placement import place
from tests.protocol.forecast.jobs import job_of


@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("absent", [(), (0,), (2, 3, 7)])
@pytest.mark.parametrize("domain", ["node", "rack"])
def test_every_loss_is_judged_as_by_the_placement(domain: str, absent: tuple[int, ...], copies: int) -> None:
    """Compared with the smallest fatal sets of failure domains, where every rank is lost that is in one of them."""
    rack_nodes = 2 if domain == "rack" else 1
    job = job_of(9, rack_nodes=2, copies=copies, failure_domain=domain)
    coverage = Coverage(job.cluster, job.choices)
    present = [node for node in range(9) if node not in absent]
    placed = place([f"d{node // rack_nodes}" for node in present], copies)
    fatal = [set(domains) for domains in placed.fatal_losses()]
    for count in range(5):
        for lost in combinations(present, count):
            covered = coverage.covers(lost, absent)
            whole = {f"d{node // rack_nodes}" for node in lost}
            if domain == "node":
                assert covered == (not any(domains <= whole for domains in fatal))
            elif not any(domains <= whole for domains in fatal):
                assert covered
            places = {present.index(node) for node in lost}
            assert covered == (not any(places.issuperset({p, *placed.holders[p]}) for p in places))


def test_a_single_node_has_no_copies() -> None:
    job = job_of(1)
    coverage = Coverage(job.cluster, job.choices)
    assert coverage.covers((), ())
    assert not coverage.covers((0,), ())


def test_too_few_failure_domains_are_refused_with_the_fix() -> None:
    job = job_of(4, rack_nodes=2, copies=2, failure_domain="rack")
    message = domains_error(job.cluster, job.choices)
    assert message == "copies=2 needs 3 racks (the writer's own and 2 more), but the job has 2: set copies=1"
    fine = job_of(4, rack_nodes=2, copies=2)
    assert domains_error(fine.cluster, fine.choices) is None


def test_one_rack_is_placed_over_its_nodes() -> None:
    job = job_of(4, rack_nodes=8, failure_domain="rack")
    coverage = Coverage(job.cluster, job.choices)
    assert coverage.covers((1,), ())
    assert not coverage.covers((0, 1), ())
