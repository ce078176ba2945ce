"""The tests of the installed release are found in a repository, a folder or a new clone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

from tests.upstream import sources
from tests.upstream.sources import SourcesError, find_sources, nearest_tag

TAGS = ["2.5.9", "2.6.0", "2.6.5", "2.6.5rc1", "2.6.10", "2.7.0", "app/2.6.6"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two releases and the layout of Lightning's."""
    root = tmp_path_factory.mktemp("repository")

    def git(*arguments: str) -> None:
        name = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *name, *arguments], cwd=root, check=True, capture_output=True)

    git("init")
    for tag in ("2.6.0", "2.6.5"):
        for name in ("tests_pytorch/test_a.py", "tests_fabric/__init__.py", "legacy/large"):
            path = root / "tests" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {tag}\n")
        (root / "pyproject.toml").write_text("")
        git("add", ".")
        git("commit", "--message", tag)
        git("tag", tag)
    return root


@pytest.mark.parametrize(
    ("installed", "tag"), [("2.6.0", "2.6.0"), ("2.6.6", "2.6.5"), ("2.6.11", "2.6.10"), ("2.5.9", "2.5.9")]
)
def test_the_nearest_release_of_the_same_minor_version(installed: str, tag: str) -> None:
    assert nearest_tag(TAGS, Version(installed)) == tag


@pytest.mark.parametrize("installed", ["2.4.0", "3.0.0"])
def test_tests_of_another_minor_version_are_not_used(installed: str) -> None:
    with pytest.raises(SourcesError, match="no tag of the repository is a release"):
        nearest_tag(TAGS, Version(installed))


@pytest.mark.parametrize("is_given", [True, False])
def test_a_release_is_extracted_from_a_repository(
    repository: Path, is_given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "URL", repository.as_uri())
    found = find_sources(repository if is_given else None, tmp_path / "cache", Version("2.6.6"))
    assert found.tag == "2.6.5"
    assert (found.tests / "test_a.py").read_text() == "# 2.6.5\n"
    assert (found.root / "pyproject.toml").exists()
    assert not (found.root / "tests" / "legacy").exists()


def test_a_named_release_is_used(repository: Path, tmp_path: Path) -> None:
    found = find_sources(repository, tmp_path, Version("2.6.6"), "2.6.0")
    assert (found.tests / "test_a.py").read_text() == "# 2.6.0\n"


def test_a_folder_of_tests_is_used_unchanged(tmp_path: Path) -> None:
    (tmp_path / "tests" / "tests_pytorch").mkdir(parents=True)
    assert find_sources(tmp_path, tmp_path / "cache", Version("2.6.6")).root == tmp_path


def test_an_unusable_path_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SourcesError, match="neither a repository nor a folder with tests/tests_pytorch"):
        find_sources(tmp_path, tmp_path, Version("2.6.6"))
    with pytest.raises(SourcesError, match="is not a folder: give a clone of"):
        find_sources(tmp_path / "missing", tmp_path, Version("2.6.6"))
