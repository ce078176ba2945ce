"""A host state is read without the script that wrote it, and the script can read it back unchanged."""

from __future__ import annotations

import enum
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from lightning_ckptless.durable.host_state_pickle import PICKLE_MODULE, read_pickle
from lightning_ckptless.formats.packing import Part, pack
from lightning_ckptless.formats.pickles import Packed
from lightning_ckptless.trainer.state.device_pickle import _Bundle

PROGRAM = """
    import dataclasses, enum, pickle, sys
    from pathlib import Path

    class Colour(enum.Enum):
        RED = 1

    @dataclasses.dataclass
    class Setting:
        name: str
        depth: int
        class Inner:
            pass

    inner = Setting.Inner()
    inner.value = 3
    if sys.argv[1] == "write":
        Path("data").write_bytes(pickle.dumps({"c": Colour.RED, "s": Setting("a", 2), "i": inner, "n": 5}))
    else:
        found = pickle.loads(Path("again").read_bytes())
        assert found["c"] is Colour.RED and found["s"] == Setting("a", 2) and found["i"].value == 3 and found["n"] == 5
"""


def test_the_script_reads_its_own_classes_back(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))

    def run(what: str) -> None:
        subprocess.run([sys.executable, "program.py", what], cwd=tmp_path, timeout=60, check=True)

    run("write")
    found = read_pickle((tmp_path / "data").read_bytes())
    assert found["n"] == 5
    with (tmp_path / "again").open("wb") as file:
        PICKLE_MODULE.Pickler(file, protocol=2).dump(found)
    run("read")


def test_parts_are_read_as_their_values() -> None:
    found = read_pickle(bytes(pack({"a": Part(pack([Known.ONE, torch.ones(2)])), "b": Known.ONE})))
    assert type(found["a"][0]) is type(found["b"])
    assert torch.equal(found["a"][1], torch.ones(2))


class Known(enum.Enum):
    ONE = 1


def test_enumeration_members_are_written_as_those_of_the_script(tmp_path: Path) -> None:
    found = read_pickle(pack({"known": Known.ONE, "loss": torch.nn.functional.relu}))
    with (tmp_path / "again").open("wb") as file:
        PICKLE_MODULE.Pickler(file, protocol=2).dump(found)
    assert pickle.loads((tmp_path / "again").read_bytes()) == {"known": Known.ONE, "loss": torch.nn.functional.relu}


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_runs_when_a_state_is_read(tmp_path: Path) -> None:
    data = pickle.dumps({"n": 5, "planted": Planted(tmp_path / "here"), "shell": os.system})
    pickle.loads(data)
    (tmp_path / "here").unlink()
    assert read_pickle(data)["n"] == 5
    assert not (tmp_path / "here").exists()


def test_tensors_are_read_on_the_host() -> None:
    value = {"a": torch.arange(6).view(2, 3), "b": torch.empty(0, 4), "c": torch.tensor(2.5)}
    found = read_pickle(pack(value))
    assert all(torch.equal(found[name], value[name]) for name in value)


def test_tensors_of_a_device_are_read_on_the_host() -> None:
    class Beside(pickle.Pickler):
        def persistent_id(self, value: object) -> int | None:
            return 0 if isinstance(value, torch.Tensor) else None

    import io

    out = io.BytesIO()
    Beside(out).dump({"mean": torch.tensor(1.0)})
    found = read_pickle(pack(_Bundle(Packed(out.getvalue()), [torch.tensor(7.0)], ["cuda"])))
    assert found["mean"].device.type == "cpu" and float(found["mean"]) == 7.0
