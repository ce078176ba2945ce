"""The examples with LightningCLI: all settings are in a YAML file, parsed with OmegaConf.

python examples/cli.py fit --config configs/two_cpu_ranks.yaml
python examples/cli.py fit --config configs/two_cpu_ranks.yaml --trainer.max_epochs 1
python examples/cli.py fit --trainer.strategy.help lightning_ckptless.CkptlessStrategy
"""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI


def main() -> None:
    LightningCLI(seed_everything_default=1, parser_kwargs={"parser_mode": "omegaconf"})


if __name__ == "__main__":
    main()
