"""Every private name of Lightning and torchmetrics that we use exists and behaves as expected."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ckptless.distributions import LIGHTNING
from lightning_ckptless.errors import VersionError
from lightning_ckptless.formats.packing import pack, unpack
from lightning_ckptless.internals.lightning import log_files as host_loggers
from lightning_ckptless.internals.lightning import names, versions
from lightning_ckptless.internals.lightning.ddp import model_averaging_period
from lightning_ckptless.internals.lightning.distribution import (
    distribution_of,
    fabric_module,
    imported_distribution,
    is_a,
    module,
)
from lightning_ckptless.internals.lightning.launch import (
    CKPT_PATH_INDEX,
    fit_parameters,
    is_fit,
    is_stop,
)
from lightning_ckptless.internals.lightning.logger_identity import private_attributes, set_identity
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.supported import release
from lightning_ckptless.trainer.data.loader import ResumableLoader, make_resumable
from lightning_ckptless.trainer.strategy.recoverable import BEFORE_SETUP
from tests.lab.parts import Numbers
from tests.trainer.tiny import DISTRIBUTIONS, callback, tiny_loader, tiny_module, tiny_trainer

# How to find the owners of private names in the middle of an epoch.
OWNERS: dict[str, Callable[[Any], Any]] = {
    "core.module:LightningModule": lambda t: t.lightning_module,
    "loops.evaluation_loop:_EvaluationLoop": lambda t: t.fit_loop.epoch_loop.val_loop,
    "loops.fetchers:_PrefetchDataFetcher": lambda t: t.fit_loop._data_fetcher,
    "loops.fit_loop:_FitLoop": lambda t: t.fit_loop,
    "loops.loop:_Loop": lambda t: t.fit_loop.epoch_loop,
    "loops.progress:_BatchProgress": lambda t: t.fit_loop.epoch_loop.batch_progress,
    "loops.training_epoch_loop:_TrainingEpochLoop": lambda t: t.fit_loop.epoch_loop,
    "trainer.connectors.checkpoint_connector:_CheckpointConnector": lambda t: t._checkpoint_connector,
    "trainer.connectors.data_connector:_DataLoaderSource": lambda t: t.fit_loop._data_source,
    "trainer.connectors.logger_connector.logger_connector:_LoggerConnector": lambda t: t._logger_connector,
    "trainer.connectors.logger_connector.result:_ResultCollection": lambda t: t._results,
    "trainer.connectors.signal_connector:_SignalConnector": lambda t: t._signal_connector,
    "trainer.trainer:Trainer": lambda t: t,
    "utilities.combined_loader:CombinedLoader": lambda t: t.fit_loop._combined_loader,
    "utilities.combined_loader:_MaxSizeCycle": lambda t: t.fit_loop._combined_loader._iterator,
}
IS_2_6 = release(importlib.import_module(LIGHTNING).__version__) >= (2, 6)
# Attributes that are set later, and those that exist since Lightning 2.6.
LATER = {"trainer.trainer:Trainer": " val_check_batch"}
SINCE_2_6 = {
    "loops.training_epoch_loop:_TrainingEpochLoop": " _broadcast_sigterm_tensor",
    "trainer.trainer:Trainer": " val_check_batch _last_val_time _train_start_time _val_check_time_interval",
}


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def absent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names that one distribution lacks in the middle of an epoch."""
    missing: set[str] = set()
    more = SINCE_2_6 if IS_2_6 else LATER

    def look(trainer: Any, *_: Any) -> None:
        for place, find in OWNERS.items():
            wanted = (names.NAMES[place] + more.get(place, "")).split()
            missing.update(f"{place}.{name}" for name in wanted if not hasattr(find(trainer), name))

    interval = {"hours": 1} if IS_2_6 else 1
    options: dict[str, Any] = {"val_check_interval": interval, "check_val_every_n_epoch": None}
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("names"), request.param, max_steps=1, limit_train_batches=1, **options
    )
    trainer.callbacks.append(callback(request.param, on_train_batch_end=look))
    trainer.fit(tiny_module(request.param), tiny_loader(), tiny_loader())
    return missing


def test_the_loops_have_every_required_name(absent: set[str]) -> None:
    assert not absent, f"Lightning lacks {', '.join(sorted(absent))}"


def test_every_owner_in_the_table_is_checked() -> None:
    assert {place for place in names.NAMES if ":" in place} == set(OWNERS)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_names_are_found_before_there_is_a_trainer(distribution: str) -> None:
    names.require(distribution)
    assert callable(importlib.import_module(f"{distribution}.cli").SaveConfigCallback)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_missing_name_is_reported_before_training(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module(distribution, "loops.training_epoch_loop")._TrainingEpochLoop, "_should_accumulate")
    monkeypatch.delattr(module(distribution, "utilities.exceptions"), "_TunerExitException")
    with pytest.raises(VersionError) as raised:
        names.require(distribution)
    assert f"{distribution} {module(distribution).__version__} lacks" in str(raised.value)
    assert "utilities.exceptions._TunerExitException" in str(raised.value)


# ---------------------------------------------------------------------- distributions


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_distribution_of_an_object_is_found(distribution: str) -> None:
    assert distribution_of(tiny_module(distribution)) == distribution
    assert is_a(module(distribution, "callbacks").Timer(), "callbacks", "Timer")
    assert not is_a(module(distribution, "callbacks").Timer(), "callbacks", "ProgressBar")
    assert not is_a(object(), "callbacks", "ThereIsNoSuchClass")


def test_other_objects_get_the_imported_distribution() -> None:
    assert distribution_of(object()) == imported_distribution() == LIGHTNING


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sampler_epochs_are_set_by_a_function_of_fabric(distribution: str) -> None:
    sampler: Any = DistributedSampler(Numbers(4), num_replicas=2, rank=0)
    fabric_module(distribution, "utilities.data")._set_sampler_epoch(DataLoader(Numbers(4), sampler=sampler), 5)
    assert sampler.epoch == 5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_lengths_are_measured_by_a_function_of_fabric(distribution: str) -> None:
    sized_len = fabric_module(distribution, "utilities.data").sized_len
    assert sized_len(DataLoader(Numbers(4), batch_size=2)) == 2
    assert sized_len(iter(())) is None


# ---------------------------------------------------------------------- launch


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_fit_passes_its_checkpoint_path_to_the_launcher(distribution: str, tmp_path: Path) -> None:
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        @property
        def is_interactive_compatible(self) -> bool:
            return True

        def launch(self, function: Any, *args: Any, **kwargs: Any) -> None:
            calls.append((function, args, kwargs))

        def kill(self, signum: Any) -> None:
            """Do nothing, as no process was started."""

    trainer = tiny_trainer(tmp_path, distribution)
    trainer.strategy._launcher = Recorder()
    trainer.fit(tiny_module(distribution), ckpt_path="here.ckpt")
    trainer.validate(tiny_module(distribution), ckpt_path="here.ckpt")
    (fit, args, kwargs), (validate, *_) = calls
    assert fit_parameters(distribution)[CKPT_PATH_INDEX] == "ckpt_path"
    assert args[CKPT_PATH_INDEX] == "here.ckpt"
    assert kwargs["trainer"] is trainer
    assert is_fit(fit)
    assert not is_fit(validate)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_requests_to_stop_are_not_faults(distribution: str) -> None:
    errors = module(distribution, "utilities.exceptions")
    for error in (errors.SIGTERMException(), errors._TunerExitException(), KeyboardInterrupt(), SystemExit(1)):
        assert is_stop(error), error
    assert not is_stop(ValueError())
    assert not is_stop(errors.MisconfigurationException())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_period_of_model_averaging_is_read(distribution: str) -> None:
    strategy = module(distribution, "strategies").DDPStrategy
    assert model_averaging_period(strategy()) is None
    assert model_averaging_period(strategy(model_averaging_period=3)) == 3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("is_beginning", [True, False])
def test_the_beginning_of_a_run_can_be_skipped(tmp_path: Path, distribution: str, is_beginning: bool) -> None:
    model, seen = tiny_module(distribution), list[str]()
    model.save_hyperparameters({"width": 3})
    checks = callback(distribution, on_sanity_check_start=lambda *_: seen.append("sanity check"))
    logger = module(distribution, "loggers").CSVLogger(str(tmp_path))
    trainer = tiny_trainer(
        tmp_path, distribution, logger=logger, callbacks=[checks], num_sanity_val_steps=1, max_steps=1
    )
    with nullcontext() if is_beginning else versions.without_beginning(trainer):
        trainer.fit(model, tiny_loader(), tiny_loader())
    assert (seen == ["sanity check"], logger.experiment.hparams == {"width": 3}) == (is_beginning, is_beginning)
    assert trainer.num_sanity_val_steps == 1
    again = tiny_trainer(
        tmp_path, distribution, logger=module(distribution, "loggers").CSVLogger(str(tmp_path)), max_steps=1
    )
    again.fit(model, tiny_loader())
    assert again.logger.experiment.hparams == {"width": 3}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_time_based_validation_interval_is_recognized(tmp_path: Path, distribution: str) -> None:
    assert not versions.validates_by_clock(tiny_trainer(tmp_path, distribution, val_check_interval=2))
    if IS_2_6:
        options: dict[str, Any] = {"val_check_interval": {"hours": 1}, "check_val_every_n_epoch": None}
        assert versions.validates_by_clock(tiny_trainer(tmp_path, distribution, **options))


# ---------------------------------------------------------------------- loops


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_counters_are_restored_without_restart_flags(distribution: str, tmp_path: Path) -> None:
    saved: list[Any] = []
    steps: list[int] = []

    def note(trainer: Any, *_: Any) -> None:
        saved.append(unpack(pack(FitLoops(trainer).counters())))

    options = {"val_check_interval": 2, "max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    trainer = tiny_trainer(
        tmp_path / "first", distribution, callbacks=[callback(distribution, on_train_end=note)], **options
    )
    trainer.fit(tiny_module(distribution), tiny_loader(), tiny_loader())

    def take_over(trainer: Any, *_: Any) -> None:
        loops = FitLoops(trainer)
        loops.set_counters(saved[0])
        steps.append(loops.batches_that_stepped)
        assert loops.counters() == saved[0]
        for loop in loops._all(loops.fit):
            assert not (loop._restarting or loop._loaded_from_state_dict or loop._resuming_from_checkpoint)
            assert getattr(loop, "_restart_stage", "none") == "none"

    hook = callback(distribution, on_train_start=take_over)
    fresh = tiny_trainer(tmp_path / "second", distribution, callbacks=[hook], **options)
    fresh.fit(tiny_module(distribution), tiny_loader(), tiny_loader())
    assert steps == [8]
    assert fresh.global_step == 8
    assert fresh.current_epoch == 2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_counters_are_those_of_lightnings_own_state(distribution: str, tmp_path: Path) -> None:
    steps: list[int] = []

    def compare(trainer: Any, *_: Any) -> None:
        own = trainer.fit_loop.state_dict()
        own["state_dict"].pop("combined_loader", None)
        assert loops.counters()["fit_loop"] == own
        assert loops.step == trainer.global_step
        steps.append(trainer.global_step)

    hooks = callback(distribution, on_train_batch_end=compare, on_validation_batch_end=compare, on_fit_end=compare)
    trainer = tiny_trainer(tmp_path, distribution, callbacks=[hooks], val_check_interval=2, max_epochs=2)
    loops = FitLoops(trainer)
    trainer.fit(tiny_module(distribution), tiny_loader(), tiny_loader())
    assert steps[-1] == 8


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_steps_of_manual_optimization_are_counted(distribution: str, tmp_path: Path) -> None:
    module, found = tiny_module(distribution), list[tuple[int, int]]()
    module.automatic_optimization = False
    module.training_step = lambda *_: [module.optimizers().step() for _ in range(2)] and None
    hooks = callback(
        distribution,
        on_train_batch_end=lambda trainer, *_: found.append((FitLoops(trainer).step, trainer.global_step)),
    )
    trainer = tiny_trainer(tmp_path, distribution, callbacks=[hooks], max_epochs=1)
    trainer.fit(module, tiny_loader())
    assert found[:2] == [(2, 2), (4, 4)]


def test_a_counter_whose_holder_is_replaced_is_read(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, DISTRIBUTIONS[0])
    loops, epoch = FitLoops(trainer), trainer.fit_loop.epoch_loop
    loops.counters()
    epoch.batch_progress = type(epoch.batch_progress)()
    epoch.batch_progress.total.ready = 7
    assert loops.counters()["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 7
    epoch.batch_progress.total = type(epoch.batch_progress.total)(ready=8)
    assert loops.counters()["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 8


def test_a_counter_that_appears_later_is_read(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, DISTRIBUTIONS[0])
    loops = FitLoops(trainer)
    loops.counters()
    trainer.fit_loop.epoch_loop.extra = type(trainer.fit_loop.epoch_progress)()
    assert "epoch_loop.extra" in loops.counters()["fit_loop"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_loop_is_found(distribution: str, tmp_path: Path) -> None:
    loops = FitLoops(tiny_trainer(tmp_path, distribution))
    found = {type(loop).__name__ for loop in loops._all(loops.fit)}
    assert found >= {
        "_FitLoop",
        "_TrainingEpochLoop",
        "_EvaluationLoop",
        "_AutomaticOptimization",
        "_ManualOptimization",
    }


# ---------------------------------------------------------------------- loggers


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_loggers_take_their_version_from_an_attribute(distribution: str, kind: str, tmp_path: Path) -> None:
    logger = getattr(module(distribution, "loggers"), kind)(str(tmp_path))
    assert logger._version is None
    set_identity(logger, {"_version": 7})
    assert Path(logger.log_dir).name == "version_7"
    assert logger._experiment is None


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", private_attributes())
def test_loggers_keep_which_run_they_write_to_in_private_attributes(distribution: str, kind: str) -> None:
    """Checked in their source, as most of them need a further package."""
    if kind == "LitLogger" and not hasattr(module(distribution, "loggers"), kind):
        assert Version(module(distribution).__version__) < Version("2.6.6"), "Lightning lacks LitLogger"
        pytest.skip("this version of Lightning has none")
    found = "".join(inspect.getsource(cls) for cls in getattr(module(distribution, "loggers"), kind).__mro__[:-1])
    for name in private_attributes()[kind]:
        assert f"self.{name}" in found, f"Lightning lacks {kind}.{name}"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_csv_writer_calls_its_own_attributes(distribution: str, tmp_path: Path) -> None:
    logger = module(distribution, "loggers").CSVLogger(str(tmp_path))
    writer = logger.experiment
    assert type(writer) is module(distribution, "loggers.csv_logs").ExperimentWriter
    assert Path(writer.metrics_file_path).name == writer.NAME_METRICS_FILE
    calls: list[str] = []
    save, rewrite = writer.save, writer._rewrite_with_new_header

    def noted_save() -> None:
        calls.append("save")
        save()

    def noted_rewrite(keys: list[str]) -> None:
        calls.append("rewrite")
        rewrite(keys)

    writer.save, writer._rewrite_with_new_header = noted_save, noted_rewrite
    logger.log_metrics({"a": 1.0}, step=0)
    assert writer.metrics == [{"a": 1.0, "step": 0}]
    logger.save()
    assert (writer.metrics, writer.metrics_keys) == ([], ["a", "step"])
    logger.log_metrics({"b": 1.0}, step=1)
    logger.save()
    assert calls == ["save", "save", "rewrite"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_configuration_of_the_command_line_is_saved_once(distribution: str) -> None:
    cls = importlib.import_module(f"{distribution}.cli").SaveConfigCallback
    saver = cls(parser=None, config=None)
    assert vars(saver)["already_saved"] is False, "Lightning lacks SaveConfigCallback.already_saved"
    host_loggers.note_saved_config([saver], saved=True)
    # Otherwise it would save, and fail without a trainer.
    saver.setup(None, None, stage="fit")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_barrier_before_the_setup_hooks_has_its_name(
    tmp_path: Path, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, passed = tiny_trainer(tmp_path, distribution), list[str]()
    monkeypatch.setattr(trainer.strategy, "barrier", lambda name=None: passed.append(name))
    trainer.fit(tiny_module(distribution), tiny_loader())
    assert BEFORE_SETUP in passed


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("ends_well", [True, False])
def test_training_iterates_through_a_stand_in_and_does_not_change_the_loader(
    tmp_path: Path, distribution: str, ends_well: bool
) -> None:
    seen: list[Any] = []

    def look(trainer: Any, *_: Any) -> None:
        seen.append((trainer.train_dataloader, type(trainer.fit_loop._combined_loader._iterator.iterables[0])))
        copied = copy.deepcopy(trainer.fit_loop._combined_loader)
        seen.append((type(copied), type(copied.iterables)))
        if not ends_well:
            raise ValueError("raised by the script")

    loader, trainer = tiny_loader(), tiny_trainer(tmp_path, distribution, max_steps=1)
    before = type(loader), dict(vars(loader))
    loops = FitLoops(trainer)
    loops.iterate_data_through(make_resumable)
    trainer.callbacks.append(callback(distribution, on_train_batch_start=look))
    with nullcontext() if ends_well else pytest.raises(ValueError, match="raised by the script"):
        trainer.fit(tiny_module(distribution), loader)
    combined_class = module(distribution, "utilities.combined_loader").CombinedLoader
    assert seen == [(loader, ResumableLoader), (combined_class, type(loader))]
    assert (type(loader), vars(loader)) == before
    loops.give_back()
    assert type(trainer.fit_loop._combined_loader) is combined_class
    assert pickle.loads(pickle.dumps(trainer.fit_loop._data_source)).name == "train_dataloader"
