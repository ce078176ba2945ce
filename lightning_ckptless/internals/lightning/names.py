"""The private names of Lightning that are used, by module or class, except variants that some versions lack."""

from __future__ import annotations

from lightning_ckptless.internals import names
from lightning_ckptless.internals.lightning.distribution import module

_CONNECTORS = "trainer.connectors"
NAMES = {
    "trainer.trainer": "Trainer",
    "trainer.trainer:Trainer": """
        _active_loop _checkpoint_connector _default_root_dir _fit_impl _logger_connector _results _run _run_stage
        _signal_connector interrupted received_sigterm
    """,
    "trainer.call": "_call_strategy_hook",
    "trainer.states": "RunningStage TrainerFn",
    f"{_CONNECTORS}.checkpoint_connector:_CheckpointConnector": "dump_checkpoint",
    f"{_CONNECTORS}.data_connector": "_parse_num_batches _process_dataloader _request_dataloader",
    f"{_CONNECTORS}.data_connector:_DataLoaderSource": "dataloader",
    f"{_CONNECTORS}.logger_connector.logger_connector:_LoggerConnector": """
        _callback_metrics _current_fx _first_loop_iter _logged_metrics _progress_bar_metrics on_batch_start
        should_update_logs
    """,
    f"{_CONNECTORS}.logger_connector.result": "_Metadata _ResultCollection _ResultMetric _Sync",
    f"{_CONNECTORS}.logger_connector.result:_ResultCollection": "batch batch_size",
    f"{_CONNECTORS}.signal_connector:_SignalConnector": "_sigterm_notifier_fn received_sigterm",
    "core.module:LightningModule": "_current_fx_name _on_before_batch_transfer",
    "loops.fetchers": "_DataFetcher _PrefetchDataFetcher",
    "loops.fetchers:_PrefetchDataFetcher": "_start_profiler _stop_profiler batches done fetched length setup",
    "loops.fit_loop:_FitLoop": """
        _combined_loader _combined_loader_states_to_load _data_fetcher _data_source _last_train_dl_reload_epoch
        _loaded_from_state_dict _restart_stage _restarting advance done epoch_progress load_state_dict max_batches
        on_advance_end on_advance_start on_iteration_done on_run_end on_run_start reset reset_restart_stage run
        setup_data
    """,
    "loops.training_epoch_loop:_TrainingEpochLoop": """
        _batches_that_stepped _build_kwargs _is_training_done _on_after_fetch
        _on_before_fetch _restart_stage _results _should_accumulate _should_check_val_fx _skip_next_val advance
        batch_idx batch_progress done global_step on_advance_end on_iteration_done restarting
    """,
    "loops.evaluation_loop:_EvaluationLoop": """
        _combined_loader _data_source _has_run _last_val_dl_reload_epoch _results run setup_data
    """,
    "loops.loop": "_Loop",
    "loops.loop:_Loop": "on_save_checkpoint",
    "loops.optimization.automatic": "ClosureResult",
    "loops.progress": "_BaseProgress _ReadyCompletedTracker",
    "loops.progress:_BatchProgress": "is_last_batch",
    "strategies.ddp": "_sync_module_states",
    "strategies.launchers.launcher": "_Launcher",
    "utilities.combined_loader": "CombinedLoader",
    "utilities.combined_loader:CombinedLoader": "_flattened _iterator flattened limits reset",
    "utilities.combined_loader:_MaxSizeCycle": "_consumed _idx iterators",
    "utilities.exceptions": "SIGTERMException _TunerExitException",
    "loggers": "CSVLogger TensorBoardLogger",
    "loggers.csv_logs": "ExperimentWriter",
    "callbacks": """
        BaseFinetuning BatchSizeFinder DeviceStatsMonitor LearningRateFinder ModelCheckpoint ProgressBar
        StochasticWeightAveraging ThroughputMonitor Timer
    """,
}
"""Required names by `module` or `module:Class` within a distribution."""


def table_of(distribution: str) -> names.Table:
    """Return the table of required names for one distribution.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.
    """
    return {f"{distribution}.{location}": wanted for location, wanted in NAMES.items()}


def require(distribution: str) -> None:
    """Refuse a distribution of Lightning that lacks required names.

    Args:
        distribution: `lightning.pytorch` or `pytorch_lightning`.

    Raises:
        VersionError: some names do not exist.
    """
    names.require(distribution, str(module(distribution).__version__), table_of(distribution))
