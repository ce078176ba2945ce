"""Versions that are too old are refused, and untested ones produce one warning."""

from __future__ import annotations

import tomllib
import warnings
from typing import Any

import pytest
from packaging.requirements import Requirement

from lightning_ckptless import environment, supported
from lightning_ckptless.errors import VersionError
from lightning_ckptless.supported import SUPPORTED, UntestedVersionWarning, check, release
from tests.house.code import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
GOOD = {"Python": "3.12.1", "torch": "2.9.0+cu128", "lightning": "2.5.0", "pytorch-lightning": "2.6.1.post0"}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The installed versions, which a test can change."""
    versions = dict(GOOD)

    def installed(distributions: Any) -> dict[str, str]:
        wanted = {"Python", *distributions}
        return {name: text for name, text in versions.items() if name in wanted}

    monkeypatch.setattr(supported, "installed", installed)
    return versions


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.13.0+cpu", (2, 13)), ("2.8.0a0+5228986c39.nv25.06", (2, 8)), ("3.11.7", (3, 11)), ("2.6.0.post0", (2, 6))],
)
def test_a_release_is_major_and_minor_number(text: str, expected: tuple[int, int]) -> None:
    assert release(text) == expected


def test_the_installed_versions_are_supported() -> None:
    here = supported.installed(["torch", "lightning", "pytorch-lightning"])
    assert set(here) == set(SUPPORTED)
    assert supported.too_old(here) == supported.untested(here) == []


def test_supported_versions_produce_no_warning(found: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for distribution in (None, "lightning.pytorch", "pytorch_lightning"):
            check(distribution, env={})


def test_a_version_below_the_lowest_is_refused_with_the_fix(found: dict[str, str]) -> None:
    found["torch"] = "2.7.1+cu126"
    with pytest.raises(VersionError) as raised:
        check(env={})
    assert str(raised.value) == (
        'found torch 2.7.1+cu126, but lightning_ckptless requires torch >= 2.8: pip install "torch>=2.8"'
    )
    assert isinstance(raised.value, ImportError)


def test_an_old_python_is_refused(found: dict[str, str]) -> None:
    found["Python"] = "3.10.13"
    with pytest.raises(VersionError, match=r"requires Python >= 3\.11: use a newer Python$"):
        check(env={})


def test_one_supported_lightning_is_enough_until_the_other_is_used(found: dict[str, str]) -> None:
    found["pytorch-lightning"] = "1.9.5"
    check(env={})
    check("lightning.pytorch", env={})
    with pytest.raises(VersionError, match=r"found pytorch-lightning 1\.9\.5"):
        check("pytorch_lightning", env={})
    found["lightning"] = "2.4.0"
    with pytest.raises(VersionError, match=r"lightning >= 2\.5 and pytorch-lightning >= 2\.5"):
        check(env={})


def test_a_newer_version_produces_one_warning(found: dict[str, str]) -> None:
    found["torch"], env = "2.99.0", dict[str, str]()
    with pytest.warns(UntestedVersionWarning, match=rf"torch 2\.99\.0 .*{environment.UNTESTED_VERSIONS}=1 to silence"):
        check(env=env)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(env=env)


@pytest.mark.parametrize("env", [{environment.UNTESTED_VERSIONS: "1"}, {"RANK": "3"}])
def test_the_warning_can_be_silenced(found: dict[str, str], env: dict[str, str]) -> None:
    found["torch"] = "2.99.0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(env=env)


def test_the_project_metadata_agrees() -> None:
    needs = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    for name in ("torch", "lightning"):
        lowest = ".".join(map(str, SUPPORTED[name].lowest))
        assert str(needs[name].specifier) == f">={lowest}"
    assert PROJECT["requires-python"] == f">={'.'.join(map(str, SUPPORTED['Python'].lowest))}"
    (_, first), (_, last) = SUPPORTED["Python"]
    classifiers = {f"Programming Language :: Python :: 3.{minor}" for minor in range(first, last + 1)}
    assert classifiers <= set(PROJECT["classifiers"])
