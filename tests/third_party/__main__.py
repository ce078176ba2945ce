"""Run all projects, or those whose programs are given, and print the table of docs/third-party.md.

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
    parser.add_argument("--folder", type=Path, help="folder for the runs (default: a temporary folder)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="third-party-"))
    print(f"results are in {folder}\n\n{HEADER}", flush=True)
    found = [_row(project, folder / project.program) for project in PROJECTS if _is_selected(project, args.programs)]
    print("\n" + "\n\n".join(problem for problems in found for problem in problems))


def _is_selected(project: Project, programs: list[str]) -> bool:
    return not programs or project.program in programs


def _row(project: Project, folder: Path) -> list[str]:
    """Run a project and print its row; return the problems."""
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
