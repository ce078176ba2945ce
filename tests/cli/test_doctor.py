"""The doctor on this host, and on scripts whose imports really run in separate processes."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from lightning_ckptless.cli.app import app
from lightning_ckptless.cli.checks import imports, script
from lightning_ckptless.cli.checks.check import Check, State, Status
from lightning_ckptless.cli.checks.imports import Probed, Target, Thread, probe
from lightning_ckptless.cli.checks.probe import size_of
from lightning_ckptless.cli.checks.script import Import
from lightning_ckptless.errors import OptionsError

PUMP = """
import threading
done = threading.Event()
threading.Thread(target=done.wait, name="pump", daemon=True).start()
"""


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


def look(folder: Path, text: str, *, model: str = "", timeout_s: float = 120.0) -> Probed:
    """Probe a script without preloading torch and Lightning."""
    (path := folder / "train.py").write_text(text)
    return probe(Target.of(str(path), is_module=False), preload=(), model=model, timeout_s=timeout_s)


def found(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


# ---------------------------------------------------------------- the command


def test_this_node(tmp_path: Path) -> None:
    result = doctor("--arena-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    for name in ("Python", "torch", "arena space", "open files", "pidfd", "host name", "NCCL variables", "clock"):
        assert f" {name} " in result.output
    assert "training works here" in result.output


def test_the_json_report(tmp_path: Path) -> None:
    result = doctor("--json", "--parameters", "1M", "--ranks", "2", "--durable-dir", str(tmp_path / "durable"))
    report = json.loads(result.output)
    assert result.exit_code == 0 and set(report) == {"works", "checks"} and report["works"] is True
    for check in report["checks"]:
        assert set(check) == {"name", "status", "found", "expected", "fix"}
        assert check["status"] in {"ok", "warning", "failure"} and check["found"] and check["expected"]
        assert bool(check["fix"]) is (check["status"] != "ok")
    names = [check["name"] for check in report["checks"]]
    assert len(set(names)) == len(names) and "durable folder" in names


def test_a_model_that_does_not_fit_is_a_failure() -> None:
    result = doctor("--json", "--parameters", "1000T", "--ranks", "2")
    report = json.loads(result.output)
    assert result.exit_code == 1 and report["works"] is False
    failures = {check["name"] for check in report["checks"] if check["status"] == "failure"}
    assert "memory" in failures
    shown = doctor("--parameters", "1000T", "--ranks", "2")
    assert shown.exit_code == 1 and "training will not work here: " in shown.output and "--shm-size" in shown.output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_small_file_system_is_a_warning(tmp_path: Path) -> None:
    """The file system is like /dev/shm in a container without `--shm-size`."""
    (small := tmp_path / "shm").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)], check=False).returncode != 0:
        pytest.skip("this user may not mount")
    try:
        fits = doctor("--json", "--parameters", "2M", "--arena-dir", str(small))
        does_not = doctor("--json", "--parameters", "3M", "--arena-dir", str(small))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert (fits.exit_code, does_not.exit_code) == (0, 0), "the agent would hold the slots"
    checks = {check["name"]: check for check in json.loads(does_not.output)["checks"]}
    assert checks["arena folder"]["status"] == "ok"
    assert checks["arena space"]["status"] == "warning"
    assert checks["arena space"]["found"].startswith("67.1 MB free in")
    assert "--shm-size" in checks["arena space"]["fix"]
    assert checks["arena space"]["expected"].startswith("96.0 MB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "cannot read the script 'missing.py'"),
        (["-m", "no_such_package.train"], "there is no module 'no_such_package.train'"),
        (["--model", "Net"], "--model needs a script"),
        (["--parameters", "many"], "expected a number"),
    ],
)
def test_invalid_arguments_are_refused(arguments: list[str], message: str) -> None:
    result = doctor(*arguments)
    assert isinstance(result.exception, OptionsError)
    assert message in str(result.exception)


def test_a_script_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="not a Python script that this interpreter can parse"):
        look(tmp_path, "import (")


def test_help_and_the_checks_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from lightning_ckptless.cli.app import app\n"
        "assert CliRunner().invoke(app, ['doctor', '--json']).output\n"
        "print([name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.long
def test_a_whole_script(tmp_path: Path) -> None:
    (tmp_path / "pump.py").write_text(PUMP)
    (path := tmp_path / "train.py").write_text(
        "import pump\n"
        "from lightning.pytorch import LightningModule, Trainer\n"
        "from torch import nn\n"
        "class Net(LightningModule):\n"
        "    def __init__(self, width=2000):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(width, width, bias=False)\n"
        "open('ran', 'w')\n"
    )
    report = json.loads(doctor("--json", str(path), "--model", "Net", "--ranks", "2").output)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["works"] is True
    # Threads of torch and Lightning do not count, as they are preloaded.
    assert checks["fork safety"]["found"] == "pump starts a thread: pump (line 1, `import pump`)"
    assert "4,000,000 parameters" in checks["model"]["found"]
    # Two slots of 12 bytes per parameter, plus those of the first step with 4 bytes per parameter.
    assert checks["arena space"]["expected"].startswith("128.0 MB")
    assert not Path("ran").exists()


def test_every_check_is_documented(tmp_path: Path) -> None:
    (path := tmp_path / "train.py").write_text("import json\n")
    probed = probe(Target.of(str(path), is_module=False), preload=(), timeout_s=120.0)
    of_machine = json.loads(doctor("--json", "--durable-dir", str(tmp_path / "durable")).output)["checks"]
    names = {check["name"] for check in of_machine} | {check.name for check in imports.check_script(probed, "")}
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    documented = {name for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for name in row.split(", ")}
    assert {name.strip("`") for name in documented} >= names


# ---------------------------------------------------------------- what a script imports


def test_imports_are_found_in_the_source() -> None:
    tree = ast.parse(
        "from __future__ import annotations\n"
        "import a, b.c as d\n"
        "from e import f, g\n"
        "from . import sibling\n"
        "if TYPE_CHECKING:\n    import types_only\n"
        "try:\n    import maybe\nexcept ImportError:\n    import instead\n"
        "if FAST:\n    import fast\n"
        "with quiet():\n    import noisy\n"
        "def main():\n    import later\n"
        "if __name__ == '__main__':\n    import never\n    main()\n"
    )
    read = script.imports_of(tree)
    assert [(each.module, each.line) for each in read if not each.is_optional] == [
        ("a", 2), ("b.c", 2), ("e", 3), (".", 4), ("noisy", 14)
    ]  # fmt: skip
    assert [each.module for each in read if each.is_optional] == ["maybe", "fast"]
    assert read[1].code == "import b.c as d"


def test_definitions_call_nothing() -> None:
    tree = ast.parse("WIDTH = 3\nCLOCK = now()\nmain()\nclass Net(LightningModule):\n    pass\nx: int = f(1)\n")
    assert script.definitions_of(tree).splitlines() == ["WIDTH = 3", "", "class Net(LightningModule):", "    pass"]
    assert script.models_of(tree) == ["Net"]


def test_the_module_that_starts_a_thread_is_named(tmp_path: Path) -> None:
    (tmp_path / "pump.py").write_text(PUMP)
    (tmp_path / "helper.py").write_text("import json\nimport pump\nimport csv\n")
    probed = look(tmp_path, "import os\nimport helper\nimport string\n")
    assert probed.threads == (Thread("pump", "pump", 1),)
    check = imports.check_fork_safety(probed)
    assert check.status is Status.WARNING
    assert check.found == "pump starts a thread: pump (line 2, `import helper`)"


def test_a_thread_that_python_does_not_know_is_attributed_to_an_import(tmp_path: Path) -> None:
    (tmp_path / "native.py").write_text(
        "import ctypes\n"
        "pause = ctypes.CDLL(None).pause\n"
        "thread = ctypes.c_ulong()\n"
        "ctypes.CDLL(None).pthread_create(ctypes.byref(thread), None, pause, None)\n"
    )
    (tmp_path / "first.py").write_text("")
    probed = look(tmp_path, "import first\nimport native\n")
    assert [(thread.index, thread.module) for thread in probed.threads] == [(1, "native")]


def test_threads_that_have_ended_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "brief.py").write_text(
        "import threading\nthread = threading.Thread(target=int)\nthread.start()\nthread.join()\n"
    )
    probed = look(tmp_path, "import brief\n")
    assert probed.threads == () and imports.check_fork_safety(probed).status is Status.OK


def test_only_imports_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    probed = look(tmp_path, f"import sys\nopen({str(mark)!r}, 'w')\nsys.exit(3)\nimport json\n")
    checks = imports.check_script(probed, "")
    assert found(checks, "imports").status is Status.OK and found(checks, "imports").found == "2 of 2"
    assert not mark.exists()


def test_a_missing_import_is_a_failure(tmp_path: Path) -> None:
    probed = look(
        tmp_path, "import json\nimport no_such_thing\ntry:\n    import nor_this\nexcept ImportError:\n    pass\n"
    )
    check = imports.check_imports(probed)
    assert check.status is Status.FAILURE
    assert check.found == "line 2, `import no_such_thing`: No module named 'no_such_thing'"


def test_a_missing_optional_import_is_ok(tmp_path: Path) -> None:
    probed = look(tmp_path, "import json\ntry:\n    import nor_this\nexcept ImportError:\n    pass\n")
    check = imports.check_imports(probed)
    assert check.status is Status.OK and check.found == "1 of 2; without nor_this"


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence (exit code 1)"),
        ("import os; os.kill(os.getpid(), 9)", "the process exited (signal 9)"),
        ("import sys; sys.exit(3)", "the process exited (exit code 3)"),
    ],
)
def test_an_import_that_ends_the_process(text: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(text)
    checks = imports.check_script(look(tmp_path, "import json\nimport bad\n"), "")
    assert found(checks, "imports").status is Status.FAILURE
    assert found(checks, "imports").found == f"line 2, `import bad`: {how}"
    assert [check.name for check in checks] == ["imports", "model"]


def test_an_import_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text("import threading\nthreading.Event().wait()\n")
    # On a busy host, an interpreter may need longer than the first limit to reach the import.
    tries = (look(tmp_path, "import stuck\n", timeout_s=limit_s) for limit_s in (1.0, 10.0, 100.0))
    check = imports.check_imports(next(probed for probed in tries if probed.last is not None))
    assert check.status is Status.FAILURE and "`import stuck`: not finished within" in check.found


def test_a_module_with_relative_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package := tmp_path / "package").mkdir()
    (package / "__init__.py").write_text("")
    (package / "pump.py").write_text(PUMP)
    (package / "train.py").write_text("from . import pump\nfrom .pump import done\n")
    monkeypatch.chdir(tmp_path)
    probed = probe(Target.of("package.train", is_module=True), preload=(), timeout_s=120.0)
    assert not probed.missing and [thread.module for thread in probed.threads] == ["package.pump"]


@pytest.mark.parametrize("expression", ["Net", "Net(10)", "make", "made.Net"])
def test_the_size_of_a_model(expression: str) -> None:
    import torch

    class Net(torch.nn.Module):
        def __init__(self, width: int = 10) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(width, 2, dtype=torch.bfloat16)
            self.same = self.layer
            self.frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
            self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    size = size_of(expression, {"Net": Net, "make": Net, "made": SimpleNamespace(Net=Net)})
    assert size == {"parameters": 27, "weight_bytes": 2 * 22 + 4 * 5 + 8 * 3, "trained_bytes": 2 * 22}


def test_the_state_follows_from_the_size_of_the_model() -> None:
    assert Probed((), weight_bytes=88, trained_bytes=44).state(2) == State(88, 88)
    assert Probed(()).state(2) is None


@pytest.mark.long
def test_a_model_that_cannot_be_created_is_a_failure(tmp_path: Path) -> None:
    checks = imports.check_script(look(tmp_path, "import json\n", model="Net"), "Net")
    assert found(checks, "imports").status is Status.OK
    model = found(checks, "model")
    assert model.status is Status.FAILURE and model.fix == "use --parameters N instead of --model"
    assert model.found.startswith("Net: NameError: name 'Net' is not defined")


def test_the_check_of_a_model() -> None:
    assert "Net: not created" in imports.check_model(Probed((), models=("Net",)), "").found
    assert imports.check_model(Probed((), weight_bytes=88, parameters=44), "Net").status is Status.OK
    refused = imports.check_model(Probed((), end="NameError"), "Net")
    assert refused.status is Status.FAILURE and refused.found == "Net: NameError"


def test_slow_imports_are_a_warning() -> None:
    heavy, light, local, unsafe = (
        Import(f"import {name}", name, line, is_optional=False)
        for line, name in enumerate(("heavy", "light", ".local", "unsafe"), 1)
    )
    took_s = {0: 2.5, 1: 0.01, 2: 0.9, 3: 0.5}
    threads = (Thread("pump", "unsafe", 3),)
    check = imports.check_import_time(
        Probed((heavy, light, local, unsafe), took_s, own=frozenset({2}), threads=threads)
    )
    assert (check.status, check.found) == (Status.WARNING, "1.4 s of 3.9 s: .local 0.9 s, unsafe 0.5 s")
    assert "standbys=1" in check.fix
    once = imports.check_import_time(Probed((heavy,), {0: 2.5}))
    assert once.status is Status.OK and "imported once for all later processes" in once.found
    assert imports.check_import_time(Probed((heavy,), {0: 2.5}, cuda="asked")).status is Status.WARNING


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import tempfile; file = tempfile.TemporaryFile()", "leaves a file or a connection open"),
        ("import random; random.random()", "draws random numbers or seeds a generator"),
        ("import sys; sys.path.append('/elsewhere')", "changes sys.path"),
        ("import os; rank = int(os.environ.get('RANK', 0))", "reads RANK, which differs between workers"),
        ("import signal; signal.signal(signal.SIGUSR2, lambda *_: None)", "handles a signal"),
    ],
)
def test_other_side_effects_of_an_import_are_a_warning(code: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "culprit.py").write_text(code + "\n")
    probed = look(tmp_path, "import json\nimport culprit\nimport csv\n")
    check = imports.check_fork_safety(probed)
    assert check.status is Status.WARNING
    assert check.found == f"culprit {what} (line 2, `import culprit`)"
    assert 1 in probed.own and 0 not in probed.own
