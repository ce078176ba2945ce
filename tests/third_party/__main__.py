"""Run every project, or those whose programs are named, and print the table of docs/third-party.md.

python -m tests.third_party [--folder FOLDER] [PROGRAM ...]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.third_party.projects import PROJECTS, Project
from tests.third_party.trial import Trial, parent_of

HEADER = """\
| Project | What is run | Under `ddp` and undisturbed | Two injected kills | SIGKILL from outside | Note |
|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", choices=[*(p.program for p in PROJECTS), []])
    parser.add_argument("--folder", type=Path, help="keep the runs in here; a temporary folder if left out")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="third-party-"))
    print(f"runs are kept in {folder}\n\n{HEADER}", flush=True)
    found = [_row(project, folder / project.program) for project in PROJECTS if _wanted(project, args.programs)]
    print("\n" + "\n\n".join(problem for problems in found for problem in problems))


def _wanted(project: Project, programs: list[str]) -> bool:
    return not programs or project.program in programs


def _row(project: Project, folder: Path) -> list[str]:
    """Run a project and print its row; what went wrong is returned."""
    if (versions := project.versions()) is None:
        return [f"{project.name} is not installed"]
    folder.mkdir(parents=True)
    with parent_of(project) as parent:
        trial = Trial(project, folder, parent)
        if project.refused is not None:
            shown = "refused" if project.refused in trial.undisturbed.tail(60) else "not refused"
            print(f"| {versions} | {project.does} | {shown} | - | - | {project.note} |", flush=True)
            return []
        results = [trial.plain(), trial.injected(), trial.outside()]
    cells = " | ".join("differs" if problems else "identical" for problems in results)
    print(f"| {versions} | {project.does} | {cells} | {project.note} |", flush=True)
    return [f"{project.name}: {problem}" for problems in results for problem in problems]


if __name__ == "__main__":
    main()
