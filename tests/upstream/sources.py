"""The sources of Lightning's tests, which no distribution on the package index contains."""

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
    """The sources of the tests cannot be had."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the tests lie.

    Args:
        root: folder with `tests/tests_pytorch` and the `pyproject.toml` that configures pytest for them.
        tag: of the repository from which they come; empty where a folder was given that is no repository.
    """

    root: Path
    tag: str

    @property
    def tests(self) -> Path:
        """Folder of the tests, to which their ids are relative."""
        return self.root / TESTS


def find_sources(given: Path | None, cache: Path, installed: Version, tag: str | None = None) -> Sources:
    """Find the tests that belong to the installed version, or fetch them.

    Args:
        given: a clone of Lightning's repository, bare or not, or a folder with its tests; None to fetch them.
        cache: folder that receives the tests that are taken out of a repository.
        installed: version of Lightning whose tests are wanted.
        tag: of the repository, where it is not to be chosen by the version.

    Raises:
        SourcesError: they cannot be had.
    """
    if given is not None and not given.is_dir():
        raise SourcesError(f"{given} is no folder: give a clone of {URL}")
    if given is not None and not _is_repository(given):
        if not (given / TESTS).is_dir():
            raise SourcesError(f"{given} is neither a repository nor a folder with {TESTS}: give a clone of {URL}")
        return Sources(given.resolve(), "")
    tag = tag or nearest_tag(_tags(given), installed)
    root = cache.resolve() / f"lightning-{tag}"
    if not (root / TESTS).is_dir():
        _take_out(given, tag, root)
    return Sources(root, tag)


def nearest_tag(tags: Iterable[str], installed: Version) -> str:
    """The newest release of the same minor version that is not newer than the installed one.

    Raises:
        SourcesError: there is none.
    """
    releases = {Version(tag): tag for tag in tags if re.fullmatch(r"\d+\.\d+\.\d+(\.post\d+)?", tag)}
    near = [v for v in releases if v.release[:2] == installed.release[:2] and v <= installed]
    if not near:
        raise SourcesError(f"no tag of the repository is a release {installed.major}.{installed.minor}.*: name one")
    return releases[max(near)]


def _is_repository(folder: Path) -> bool:
    # `.git` is a file in a worktree.
    return (folder / ".git").exists() or (folder / "objects").is_dir()


def _tags(repository: Path | None) -> list[str]:
    if repository is not None:
        return _git("-C", str(repository), "tag", "--list").split()
    return re.findall(r"refs/tags/(\S+)$", _git("ls-remote", "--tags", "--refs", URL), re.MULTILINE)


def _take_out(repository: Path | None, tag: str, root: Path) -> None:
    """Write the needed files of a tag to `root`: nothing is there unless all is."""
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
        raise SourcesError(f"git cannot be run ({error}): install it, or give a folder with {TESTS}") from error
    if done.returncode:
        raise SourcesError(
            f"git {' '.join(arguments)} failed: {done.stderr.strip()}\nGive a clone of {URL} with --lightning PATH"
        )
    return done.stdout
