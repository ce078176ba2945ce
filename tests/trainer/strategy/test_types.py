"""Type checkers and editors know the arguments of the public classes."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.internals.lightning.strategy import DataParallelArguments
from lightning_ckptless.lightning_pytorch import CkptlessModelParallelStrategy
from lightning_ckptless.options import CkptlessOptions

REPOSITORY = Path(__file__).parents[3]
RIGHT = """
from datetime import timedelta
from pathlib import Path

from {distribution} import Trainer

from {ours} import CkptlessModelParallelStrategy, CkptlessStrategy, FaultInjector

plain = CkptlessStrategy(copies=2, durable_dir=Path("durable"), mirror_every_n_steps="auto")
passed_on = CkptlessStrategy(find_unused_parameters=True, timeout=timedelta(minutes=1), start_method="fork")
sharded = CkptlessModelParallelStrategy(elastic_batch="scale", data_parallel_size=2)
Trainer(strategy=plain, callbacks=[FaultInjector("kill:rank=1:step=7")])
Trainer(strategy=passed_on)
Trainer(strategy=sharded)
"""
WRONG = {
    "CkptlessStrategy(copy=2)": 'Unexpected keyword argument "copy"',
    'CkptlessStrategy(copies="2")': 'Argument "copies" .* incompatible type "str"; expected "int"',
    'CkptlessStrategy(staging="later")': 'Argument "staging" .* expected "Literal',
    "CkptlessStrategy(find_unused_parameter=True)": 'did you mean "find_unused_parameters"',
    'CkptlessStrategy(find_unused_parameters="yes")': 'Argument "find_unused_parameters" .* expected "bool"',
    "CkptlessStrategy(data_parallel_size=2)": 'Unexpected keyword argument "data_parallel_size"',
    "CkptlessStrategy().optoins": '"CkptlessStrategy" has no attribute "optoins"',
    "CkptlessModelParallelStrategy(static_graph=True)": 'Unexpected keyword argument "static_graph"',
    'CkptlessModelParallelStrategy(tensor_parallel_size="all")': 'Argument "tensor_parallel_size"',
    "FaultInjector(7)": 'Argument 1 to "FaultInjector"',
    "lightning_ckptless.CkptlessStratgy()": 'maybe "CkptlessStrategy"',
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """What mypy says about scripts of users, by script and line."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "right.py").write_text(RIGHT.format(distribution="lightning.pytorch", ours="lightning_ckptless"))
    other = {"distribution": "pytorch_lightning", "ours": "lightning_ckptless.pytorch_lightning"}
    (folder / "right_elsewhere.py").write_text(RIGHT.format(**other))
    imports = "import lightning_ckptless; from lightning_ckptless import *"
    (folder / "wrong.py").write_text("\n".join([imports, *WRONG]))
    # The cache of `make types`: without it, torch and Lightning are analysed first, which takes half a minute.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=pyproject.toml", "--hide-error-context", *folder.glob("*.py")],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "500"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stderr
    found: dict[str, dict[int, str]] = {}
    for name, line, text in re.findall(r"(\w+\.py):(\d+): error: (.*)", done.stdout):
        found.setdefault(name, {})[int(line)] = text
    return found


@pytest.mark.slow
def test_correct_scripts_pass(complaints: dict[str, dict[int, str]]) -> None:
    assert {name: found for name, found in complaints.items() if name.startswith("right")} == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(WRONG)), ids=list(WRONG))
def test_a_wrong_line_is_named(number: int, complaints: dict[str, dict[int, str]]) -> None:
    assert re.search([*WRONG.values()][number], complaints["wrong.py"][number + 2])


def test_the_arguments_of_lightning_are_known() -> None:
    """Also with other versions of Lightning and torch, whose arguments may be fewer."""
    own = {field.name for field in fields(CkptlessOptions)}
    passed_on = arguments_of(DDPStrategy) | arguments_of(DistributedDataParallel) - {"module", "device_ids"}
    assert passed_on <= set(DataParallelArguments.__annotations__)
    assert arguments_of(ModelParallelStrategy) == arguments_of(CkptlessModelParallelStrategy) - own


def arguments_of(cls: type[Any]) -> set[str]:
    """Names of the arguments of a constructor, without `**kwargs`."""
    parameters = inspect.signature(cls).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
