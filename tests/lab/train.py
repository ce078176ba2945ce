"""The lab's run as a script."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from parts import Options, make_run


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Options):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(flag, action="store_true")
        else:
            kind = {"int": int, "float": float, "float | None": float}.get(str(field.type), str)
            parser.add_argument(flag, type=kind, default=field.default)
    return Options(**vars(parser.parse_args()))


def note_commit(path: Path, moment: str, version: Any) -> None:
    """Record that this rank has committed a version; each line is one write, so lines of ranks do not mix."""
    if moment == "committed":
        line = {"at": time.time(), "step": version.optimizer_step, "validation_done": version.validation_done}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def delay(options: Options, moment: str, _: Any) -> None:
    """Delay each mirror round, and with it each step."""
    is_over = bool(options.slow_until) and Path(options.slow_until).exists()
    if moment == options.slow_mirror_at and not is_over:
        threading.Event().wait(options.slow_mirror_s)


def held_until_committed(distribution: Any, strategy: Any) -> Any:
    """Return a callback that holds validation until the version before it is committed."""
    committed: set[int] = set()
    changed = threading.Condition()

    def note(moment: str, version: Any) -> None:
        with changed:
            if moment == "committed":
                committed.add(version.optimizer_step)
                changed.notify_all()

    class HoldValidation(distribution.callbacks.Callback):
        def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
            # A restored version is not committed again.
            if not trainer.sanity_checking and strategy.engine.generation == 1:
                with changed:
                    assert changed.wait_for(lambda: trainer.global_step in committed, 60)

    strategy.probes.append(note)
    return HoldValidation()


def main() -> None:
    options = parse()
    distribution = importlib.import_module(options.distribution)
    ours = importlib.import_module("lightning_ckptless")
    strategy_options = ast.literal_eval(options.strategy_options)
    if options.mesh:
        data, tensor = map(int, options.mesh.split("x"))
        sizes = {"data_parallel_size": data, "tensor_parallel_size": tensor}
        strategy = ours.CkptlessModelParallelStrategy(**sizes, **strategy_options)
    else:
        strategy = ours.CkptlessStrategy(**strategy_options)
    if options.slow_mirror_s:
        strategy.probes.append(partial(delay, options))
    if options.commits:
        strategy.probes.append(partial(note_commit, Path(options.commits)))
    callbacks = (held_until_committed(distribution, strategy),) if options.validate_after_commit else ()
    trainer, model, data = make_run(options, strategy, callbacks)
    trainer.fit(model, datamodule=data, ckpt_path=Path(options.ckpt_path) if options.ckpt_path else None)


if __name__ == "__main__":
    main()
