"""The installed package with either distribution of Lightning, in new interpreters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.registration.conftest import PACKAGE, Run, install_into

DISTRIBUTIONS = ["lightning.pytorch", "pytorch_lightning"]
TRAINER = "accelerator='cpu', devices=2, logger=False, enable_checkpointing=False, enable_progress_bar=False"


@pytest.mark.slow
@pytest.mark.parametrize("distribution", [DISTRIBUTIONS[0], pytest.param(DISTRIBUTIONS[1], marks=pytest.mark.long)])
def test_strategy_names_work_without_importing_the_package(run: Run, distribution: str) -> None:
    result = run(f"""
import sys
from {distribution} import Trainer
from {distribution}.strategies import DDPStrategy, ModelParallelStrategy
before = [m for m in sys.modules if m.startswith("lightning_ckptless.trainer")]
strategy = Trainer(strategy="ckptless", {TRAINER}).strategy
sharded = Trainer(strategy="ckptless_model_parallel", {TRAINER}).strategy
ddp = [
    Trainer(strategy=f"ckptless_ddp{{end}}", {TRAINER}).strategy
    for end in ("", "_find_unused_parameters_true", "_find_unused_parameters_false")
]
import lightning_ckptless
emit([
    before,
    [type(made) is type(strategy) and "ddp" in made.strategy_name for made in ddp],
    [made._ddp_kwargs for made in ddp],
    isinstance(strategy, DDPStrategy) and isinstance(sharded, ModelParallelStrategy),
    type(strategy) is lightning_ckptless.CkptlessStrategy,
    type(sharded) is lightning_ckptless.CkptlessModelParallelStrategy,
    strategy.options == sharded.options,
])
""")
    options = [{}, {"find_unused_parameters": True}, {"find_unused_parameters": False}]
    assert result == [[], [True] * 3, options, True, True, True, True]


@pytest.mark.slow
def test_without_autoload_the_package_must_be_imported(run: Run) -> None:
    """Without the call by torch, the name is unknown until the package is imported."""
    result = run(
        """
from lightning.pytorch.strategies import StrategyRegistry
before = "ckptless" in StrategyRegistry
import lightning_ckptless
emit([before, "ckptless" in StrategyRegistry, StrategyRegistry["ckptless"]["description"]])
""",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert result == [False, True, "Data parallelism that survives the loss of any rank, bit for bit"]


@pytest.mark.long
@pytest.mark.slow
def test_the_package_can_be_imported_before_lightning(run: Run) -> None:
    result = run(
        "import lightning_ckptless\nfrom lightning.pytorch.strategies import StrategyRegistry\n"
        "emit('ckptless' in StrategyRegistry)",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert result is True


@pytest.mark.slow
@pytest.mark.parametrize(
    "breakage",
    ["raise RuntimeError('broken')", "this is no python", "import a_module_that_is_not_there"],
)
def test_a_broken_hook_does_not_affect_torch(run: Run, tmp_path: Path, breakage: str) -> None:
    site = tmp_path / "broken"
    package = install_into(site)
    (package / "_registration").mkdir(parents=True)
    for name in ("__init__.py", "distributions.py", "_registration/__init__.py", "_registration/autoload.py"):
        shutil.copy(PACKAGE / name, package / name)
    (package / "_registration" / "names.py").write_text(breakage)
    result = run("import sys, torch\nemit([torch.ones(2).sum().item(), 'lightning_ckptless' in sys.modules])", site)
    assert result == [2.0, True]


@pytest.mark.slow
def test_torch_imports_only_the_hook(run: Run) -> None:
    result = run("import sys, torch\nemit(sorted(m for m in sys.modules if m.split('.')[0] == 'lightning_ckptless'))")
    small = ("", "._registration", "._registration.autoload", "._registration.mlflow_tables", "._registration.names")
    used = (".distributions", ".environment", ".system", ".system.private_files")
    assert result == [f"lightning_ckptless{name}" for name in (*small, *used)]


QUOTED = "'${trainer.max_epochs}'"
CLI = """
from {distribution}.cli import LightningCLI
from {distribution}.demos.boring_classes import BoringModel
common = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false"]

def options(*args, **kwargs):
    cli = LightningCLI(
        BoringModel, run=False, args=[*common, *args], save_config_callback=None, parser_kwargs=kwargs
    )
    strategy = cli.trainer.strategy
    own = getattr(strategy, "_ddp_kwargs", {{}}).get("find_unused_parameters")
    return [type(strategy).__name__, strategy.options.copies, getattr(strategy, "_data_parallel_size", own)]

by_class = ["--trainer.strategy=lightning_ckptless.CkptlessStrategy", "--trainer.strategy.copies=0"]
sharded = "--trainer.strategy=lightning_ckptless.CkptlessModelParallelStrategy"
emit({{
    "string": options("--trainer.strategy=ckptless"),
    "file": options("--config=string.yaml"),
    "class": options(*by_class),
    "sharded": options(sharded, "--trainer.strategy.copies=0", "--trainer.strategy.data_parallel_size=2"),
    "class in a file": options("--config=class.yaml"),
    "class in a file, omegaconf": options("--config=class.yaml", parser_mode="omegaconf"),
    "string, omegaconf": options("--config=string.yaml", parser_mode="omegaconf"),
    "interpolation": options("--config=interpolation.yaml", parser_mode="omegaconf"),
}})
"""


@pytest.mark.slow
@pytest.mark.parametrize("distribution", [DISTRIBUTIONS[0], pytest.param(DISTRIBUTIONS[1], marks=pytest.mark.long)])
def test_strategies_work_with_the_lightning_cli(run: Run, tmp_path: Path, distribution: str) -> None:
    strategy = (
        "{class_path: lightning_ckptless.CkptlessStrategy, init_args: {copies: %s, find_unused_parameters: true}}"
    )
    (tmp_path / "string.yaml").write_text("trainer: {strategy: ckptless}\n")
    (tmp_path / "class.yaml").write_text(f"trainer: {{strategy: {strategy % 0}}}\n")
    (tmp_path / "interpolation.yaml").write_text(f"trainer: {{max_epochs: 7, strategy: {strategy % QUOTED}}}\n")
    result = run(CLI.format(distribution=distribution))
    name = "CkptlessStrategy"
    assert result["string"] == result["file"] == result["string, omegaconf"] == [name, 1, None]
    assert result["class"][:2] == [name, 0]
    assert result["sharded"] == ["CkptlessModelParallelStrategy", 0, 2]
    assert result["class in a file"] == result["class in a file, omegaconf"] == [name, 0, True]
    assert result["interpolation"] == [name, 7, True]
