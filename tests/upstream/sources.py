"""The sources of Lightning's tests; no distribution on the package index contains them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

URL = "https://github.com/Lightning-AI/pytorch-lightning"
TESTS = Path("tests/tests_pytorch")
FOLDERS = ("tests/tests_pytorch", "tests/tests_fabric")


class SourcesError(Exception):
    """The sources of the tests cannot be obtained."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The location of the tests.

    Args:
        root: folder with `tests/tests_pytorch` and the `pyproject.toml` that configures pytest for them.
        tag: their tag in the repository; empty for a folder that is not a repository.
    """

    root: Path
    tag: str

    @property
    def tests(self) -> Path:
        """Folder of the tests; test ids are relative to it."""
        return self.root / TESTS


def find_sources(given: Path | None, cache: Path, installed: Version, tag: str | None = None) -> Sources:
    """Find the tests that belong to the installed version, or fetch them.

    Args:
        given: a clone of Lightning's repository, bare or not, or a folder with its tests; None to fetch them.
        cache: folder that receives the tests extracted from a repository.
        installed: installed version of Lightning.
        tag: tag in the repository; None to choose it by the version.

    Raises:
        SourcesError: the tests cannot be obtained.
    """
    if given is not None and not given.is_dir():
        raise SourcesError(f"{given} is not a folder: give a clone of {URL}")
    if given is not None and not _is_repository(given):
        if not (given / TESTS).is_dir():
            raise SourcesError(f"{given} is neither a repository nor a folder with {TESTS}: give a clone of {URL}")
        return Sources(given.resolve(), "")
    tag = tag or nearest_tag(_tags(given), installed)
    root = cache.resolve() / f"lightning-{tag}"
    if not (root / TESTS).is_dir():
        _extract(given, tag, root)
    return Sources(root, tag)


def nearest_tag(tags: Iterable[str], installed: Version) -> str:
    """Return the newest release of the same minor version that is not newer than the installed one.

    Raises:
        SourcesError: there is no such release.
    """
    releases = {Version(tag): tag for tag in tags if re.fullmatch(r"\d+\.\d+\.\d+(\.post\d+)?", tag)}
    near = [v for v in releases if v.release[:2] == installed.release[:2] and v <= installed]
    if not near:
        raise SourcesError(
            f"no tag of the repository is a release {installed.major}.{installed.minor}.*: give one with --tag"
        )
    return releases[max(near)]


def _is_repository(folder: Path) -> bool:
    # `.git` is a file in a worktree.
    return (folder / ".git").exists() or (folder / "objects").is_dir()


def _tags(repository: Path | None) -> list[str]:
    if repository is not None:
        return _git("-C", str(repository), "tag", "--list").split()
    return re.findall(r"refs/tags/(\S+)$", _git("ls-remote", "--tags", "--refs", URL), re.MULTILINE)


def _extract(repository: Path | None, tag: str, root: Path) -> None:
    """Write the needed files of a tag to `root`, atomically."""
    draft = root.with_name(root.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    if repository is None:
        _git("clone", "--quiet", "--depth=1", "--filter=blob:none", "--sparse", "--branch", tag, URL, str(draft))
        _git("-C", str(draft), "sparse-checkout", "set", *FOLDERS)
    else:
        archive = draft.with_suffix(".tar")
        _git("-C", str(repository), "archive", f"--output={archive}", tag, *FOLDERS, "pyproject.toml")
        shutil.unpack_archive(archive, draft, filter="data")
        archive.unlink()
    draft.rename(root)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SourcesError(f"cannot run git ({error}): install it, or give a folder with {TESTS}") from error
    if done.returncode:
        raise SourcesError(
            f"git {' '.join(arguments)} failed: {done.stderr.strip()}\nGive a clone of {URL} with --lightning PATH"
        )
    return done.stdout
