"""Every configuration file can be parsed, and the help of LightningCLI describes our options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_ckptless.configuration.option import options_of
from lightning_ckptless.options import CkptlessOptions
from tests.examples.conftest import CONFIGS, EXAMPLES

FILES = [*CONFIGS.glob("*.yaml"), *(path for path in EXAMPLES.glob("*/*.yaml") if path.parent.name != "clusters")]


@pytest.fixture(autouse=True)
def importable_examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the examples importable, as for `python examples/cli.py`."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in {"digits", "char_gpt"}]:
        del sys.modules[name]


def run_cli(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        LightningCLI(args=["fit", *arguments], seed_everything_default=1, parser_kwargs={"parser_mode": "omegaconf"})
    assert end.value.code == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_configuration_is_parsed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli("--config", str(path), "--print_config")
    output = capsys.readouterr().out
    assert "seed_everything: 1" in output
    assert "ckptless" in output


@pytest.mark.parametrize("strategy", ["CkptlessStrategy", "CkptlessModelParallelStrategy"])
def test_help_shows_our_options(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli("--trainer.strategy.help", f"lightning_ckptless.{strategy}")
    output = " ".join(capsys.readouterr().out.split())
    assert "staging {overlap,blocking,device}" in output
    assert [option.name for option in options_of(CkptlessOptions).values() if option.text not in output] == []


def test_all_configurations_exist() -> None:
    names = {path.stem for path in FILES}
    configs = {"two_cpu_ranks", "four_ranks_with_faults", "gpu", "sharded", "two_nodes", "elastic"}
    assert names == {*configs, "digits", "char_gpt"}
