"""Programs for third-party projects give the same results as under DDP, also after kills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.third_party.projects import PROJECTS, Project
from tests.third_party.trial import Trial, parent_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", params=PROJECTS, ids=lambda project: str(project.name))
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    project: Project = request.param
    if project.versions() is None:
        pytest.skip(f"{' and '.join(project.distributions)}: `make test-third-party` installs it")
    with parent_of(project) as parent:
        yield Trial(project, tmp_path_factory.mktemp(project.program), parent)


def test_the_undisturbed_run_matches_ddp(trial: Trial) -> None:
    if trial.project.refused is not None:
        assert trial.undisturbed.exit_code != 0
        assert trial.project.refused in trial.undisturbed.tail(60)
        assert not list(trial.undisturbed.trace.glob("*.jsonl")), "the run has trained before it was refused"
    else:
        assert trial.plain() == []


def test_two_injected_kills(trial: Trial) -> None:
    if trial.project.refused is not None:
        pytest.skip("refused before the first step")
    assert trial.injected() == []


def test_sigkill_from_outside(trial: Trial) -> None:
    if trial.project.refused is not None:
        pytest.skip("refused before the first step")
    assert trial.outside() == []
