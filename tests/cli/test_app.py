"""The command as a whole: help is fast, and user errors are reported in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning_ckptless.cli.app import app
from lightning_ckptless.errors import OptionsError

COMMANDS = ("run", "doctor", "drill", "status", "export", "clean", "timeline")


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'ckptless'; from lightning_ckptless.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "run"])
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"ckptless {command}" in result.output


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from lightning_ckptless.cli.app import app\n"
        "assert CliRunner().invoke(app, ['drill', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'lightning', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = fresh("status", "nonsense", "--run-root", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("ckptless: nonsense: no ledger.jsonl found")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py"], "no fault given: use --fault"),
        (["missing.py", "--fault", "kill:rank=1:step=7"], "cannot find the script 'missing.py'"),
        ([__file__, "--fault", "kil:rank=1:step=7"], "did you mean 'kill'"),
        (
            [__file__, "--nproc", "2", "--fault", "kill:rank=2:step=7"],
            "rank 2 does not exist, the world size is 2: use --nproc 3",
        ),
        ([__file__, "--fault", "node:rank=0:step=7"], "a drill has one node"),
    ],
)
def test_a_drill_with_invalid_arguments_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["drill", "--folder", str(tmp_path), *arguments])
    assert isinstance(result.exception, OptionsError)
    assert message in str(result.exception)


def test_a_drill_requires_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "trace").touch()
    arguments = ["drill", __file__, "--fault", "kill:rank=1:step=7", "--folder", str(tmp_path), "--launcher", "python"]
    result = CliRunner().invoke(app, arguments)
    assert "has files of another drill" in str(result.exception)


@pytest.mark.slow
def test_run_passes_arguments_and_exit_code_through(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "sys.stdout.write(f'{os.environ[\"RANK\"]} {sys.argv[1:]}\\n')\n"
        "sys.exit(5 * int(sys.argv[2]))\n"
    )
    arguments = ["run", "--nproc-per-node", "2", "--no-preload", "--max-restarts", "0", "--run-root", str(tmp_path)]
    good = fresh(*arguments, str(script), "--lr", "0")
    assert good.returncode == 0, good.stderr
    assert sorted(good.stdout.splitlines()) == ["0 ['--lr', '0']", "1 ['--lr', '0']"]
    assert fresh(*arguments, str(script), "--lr", "1").returncode == 5


@pytest.mark.slow
def test_run_help_lists_the_options_of_the_agent() -> None:
    done = fresh("run", "--help")
    assert done.returncode == 0
    assert "--nproc-per-node" in done.stdout and "--no-preload" in done.stdout
