"""What every strategy of ours has in common: one of Lightning's own, with the engine beside it.

Strategies differ in how they wrap the model, in which process groups that takes, and in what is the same on all ranks.
That is theirs to say, by the methods below *what a strategy says of itself*; all else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_ckptless.internals.lightning.ddp import start_method_of
from lightning_ckptless.internals.lightning.process import prepare_without_group
from lightning_ckptless.internals.lightning.virtual_ranks import logs_kept
from lightning_ckptless.membership.worker.placeholder_group import refuse
from lightning_ckptless.membership.worker.process_groups import use_loopback_on_one_node, world_of_process
from lightning_ckptless.membership.worker.watcher import Watcher
from lightning_ckptless.options import (
    CheckpointHooks,
    Checksum,
    CkptlessOptions,
    ElasticBatch,
    EveryNSteps,
    OnLate,
    OnUnrecoverable,
    Staging,
)
from lightning_ckptless.protocol.hang_detection import Point
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks
from lightning_ckptless.trainer.recovery.recovery_loop import run_through_faults
from lightning_ckptless.trainer.reporting.checkpoint_files import removes_by_path
from lightning_ckptless.trainer.session.engine import Engine
from lightning_ckptless.trainer.strategy.compatibility import check_trainer
from lightning_ckptless.trainer.strategy.launcher import launcher_class
from lightning_ckptless.trainer.strategy.world_size import require_ranks

BEFORE_SETUP = "pre_setup"
"""The barrier that Lightning passes before the hooks of the user's model and datamodule."""


def recoverable(base: Any, distribution: str) -> type[Any]:
    """One of Lightning's strategies for several ranks, with the engine beside it.

    Args:
        base: its class.
        distribution: the distribution that it comes from.
    """
    launcher = launcher_class(distribution)

    class Recoverable(base):  # type: ignore[misc]
        """Lightning's strategy, recoverable.

        Args:
            mirror_every_n_steps: optimizer steps between two mirrored versions; `auto` to choose by what they cost.
            copies: replicas of each shard beyond the writer's own copy.
            failure_domain: what is lost together: `node`, `rank` to keep replicas among the ranks of one node, a
                dimension of the mesh, or a level that you name, e.g. `rack`, see `CKPTLESS_FAILURE_DOMAIN`.
            arena_dir: folder for the arenas; `/dev/shm` where nothing is given and it is there.
            max_recoveries_without_progress: recoveries with no new step committed between them, after which the run
                gives up: it comes back to the same fault.
            max_recoveries_per_hour: recoveries within an hour, after which the run gives up.
            on_unrecoverable: with no complete version left, `durable` goes on from the newest checkpoint file, `raise`
                stops.
            checksum: digest that guards every replica: `xxh3`, `crc32` or `none`.
            on_late: when a mirror is still under way at the next one: `wait` for it or `skip` a version.
            staging: `overlap` copies the state while the next forward and backward run, `blocking` before they start.
            arena_keep_s: seconds for which the arena of a dead run is kept for a restart under the same run id.
            in_place: after a fault replace only what was lost and let the other ranks go on; else start all again.
            standbys: processes per node that have run the script up to `fit` and wait there for a rank.
            preload_imports: have what the program has imported when it trains imported once for all new processes, in
                the process that they are forked from.
            hang_timeout_s: seconds without progress of any rank after which those that have come least far are ended
                as hung; None to learn it from the steps, 0 for never.
            mirror_budget: with `auto`, by which share mirroring may lengthen training at most.
            failures_per_day: with `auto`, how many failures of the whole run are expected.
            health_check: dotted name of a function of yours that raises where a node is not fit to train; it is
                called, beside our own checks, before a worker joins the others.
            durable_every_n_steps: optimizer steps from one durable state to the next, written beside training; None
                for none by steps.
            durable_every_s: seconds from one durable state to the next; None for none by time.
            durable_dir: folder of the durable states; `durable` in the run's own folder where nothing is given.
            durable_keep: durable states that are kept.
            elastic_batch: with fewer ranks than at first, `keep` runs the batches of those that are missing on the
                others; `scale` makes each step of one batch per rank that is there.
            checkpoint_hooks: `every_version` calls the program's `on_save_checkpoint` hooks with each version, and
                `on_load_checkpoint` when one is restored; `never` leaves them to Lightning.
            stateless_callbacks: class names of callbacks whose `state_dict()` is not called with each version.
            trusted_classes: dotted names of classes that states may hold beside plain data when they are read from a
                disk or from another machine.
            **base_options: everything that Lightning's own strategy takes.

        Raises:
            OptionsError: a value is out of range.
        """

        observers: Callable[[], list[Any]] = staticmethod(list)
        run_job: Callable[..., Any]
        """Runs an agent in this process. Set where the rooms are put together, as `observers` is."""
        blank: Callable[[str, str], Any]
        """Makes an object of the class that a copy is filled into. Set where the class gets its public name."""

        def __init__(
            self,
            mirror_every_n_steps: EveryNSteps = 1,
            copies: int = 1,
            failure_domain: str = "node",
            arena_dir: str | Path | None = None,
            max_recoveries_without_progress: int = 10,
            max_recoveries_per_hour: int = 100,
            on_unrecoverable: OnUnrecoverable = "durable",
            checksum: Checksum = "xxh3",
            on_late: OnLate = "wait",
            staging: Staging = "overlap",
            arena_keep_s: float = 3600.0,
            in_place: bool = True,
            standbys: int = 0,
            preload_imports: bool = True,
            hang_timeout_s: float | None = None,
            health_check: str = "",
            mirror_budget: float = 0.01,
            failures_per_day: float = 1.0,
            durable_every_n_steps: int | None = None,
            durable_every_s: float | None = None,
            durable_dir: str | Path | None = None,
            durable_keep: int = 2,
            elastic_batch: ElasticBatch = "keep",
            checkpoint_hooks: CheckpointHooks = "never",
            stateless_callbacks: Sequence[str] = (),
            trusted_classes: Sequence[str] = (),
            **base_options: Any,
        ) -> None:
            given = locals()
            super().__init__(**base_options)
            self.options = CkptlessOptions(**{field.name: given[field.name] for field in fields(CkptlessOptions)})
            self.start_method = start_method_of(self)
            self.has_handed_back = False
            self._stream: int | None = None
            self.engine: Engine | None = None
            self.world = world_of_process()
            self.watcher: Watcher | None = None
            self.joins_alone = False
            self._acts_alone = False
            self.obstacle_of_calls: str | None = None
            self.is_in_call = False
            self.probes: list[Callable[[str, Version], None]] = []

        @contextmanager
        def without_engine(self) -> Iterator[None]:
            """Context in which this is plain data parallelism: no versions, and no files of them."""
            engine, self.engine = self.engine, None
            try:
                yield
            finally:
                self.engine = engine

        # -------------------------------------------------------------- copies

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Name what builds the class: there is one for each distribution of Lightning, under the same name."""
            cls = type(self)
            if "blank" not in vars(cls):
                # A class that a program has derived from ours has a name of its own.
                return super().__reduce_ex__(protocol)
            return cls.blank, (distribution, cls.strategy_name), self.__getstate__()

        def __getstate__(self) -> dict[str, Any]:
            """What describes the strategy, without what holds the ranks of a run together: that has no copy."""
            state: dict[str, Any] = super().__getstate__()
            return state | {"engine": None, "watcher": None, "world": None, "probes": [], "_launcher": None}

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            self.world = world_of_process()
            self._configure_launcher()

        # -------------------------------------------------------------- what a strategy says of itself

        replicates = True
        """Whether what is neither sharded nor a rank's own is the same on all ranks, by what the strategy does."""

        def mesh_sizes(self) -> tuple[int, int] | None:
            """Ranks in each dimension of the mesh; None without one."""
            return None

        def check_options(self) -> None:
            """Look at the strategy's own options, before anything is started.

            Raises:
                OptionsError: they cannot be.
            """

        def obstacle_in_place(self) -> str | None:
            """Why a lost rank could not be replaced while the others go on; None where it can."""
            return None

        def obstacle_to_another_world(self) -> str:
            """Why the model, as it is, could not go on among another number of ranks; empty where it can."""
            return ""

        def use_new_groups(self) -> None:
            """Let the model use the process groups of a new generation."""

        def place_among_streams(self) -> tuple[int, int, int]:
            """This rank's number among those with a share of the samples, how many there are, and ranks per share."""
            return self.global_rank, self.world_size, 1

        def asked_streams(self) -> int:
            """How many shares of the samples there are when all ranks are."""
            return int(self.num_nodes * self.num_processes)

        def without_sync(self) -> AbstractContextManager[Any]:
            """Context in which a backward pass does not sum gradients over the ranks."""
            return nullcontext()

        def sums_now(self) -> bool:
            """Whether a backward pass sums gradients over the ranks now."""
            return True

        # -------------------------------------------------------------- processes

        def _configure_launcher(self) -> None:
            self._launcher = launcher(self)

        def check_world(self) -> None:
            """Compare what the trainer was told with how many workers the agent started.

            Raises:
                OptionsError: the numbers differ.
            """
            require_ranks(
                nodes=self.num_nodes, per_node=self.num_processes, found=self.cluster_environment.world_size()
            )

        def make_streams(self, trainer: Any) -> VirtualRanks:
            """The streams of samples that this rank carries, as at the start of a run."""
            place, places, width = self.place_among_streams()
            count = self.asked_streams() if self.options.elastic_batch == "keep" else places
            return VirtualRanks(trainer, count=count, place=place, places=places, width=width)

        @contextmanager
        def as_stream(self, stream: int) -> Iterator[None]:
            """Have dataloaders that are set up within it take the share of a stream."""
            self._stream = stream
            try:
                yield
            finally:
                self._stream = None

        @property
        def distributed_sampler_kwargs(self) -> dict[str, Any]:
            """Which share of the samples a dataloader takes: of training a stream's, of the rest this rank's."""
            place, places, _ = self.place_among_streams()
            if self.engine is None or not self.engine.trainer.training:
                return {"num_replicas": places, "rank": place}
            stream, count = place if self._stream is None else self._stream, self.engine.streams.count
            return {"num_replicas": count, "rank": stream % count}

        def join_generation(self) -> bool:
            """Join the current generation, unless this process has.

            A process that takes a lost rank's place does without: it meets the others in the loop, where they are.

            Returns:
                Whether there is a process group.
            """
            use_loopback_on_one_node(self.num_processes, self.world_size)
            if self.joins_alone:
                prepare_without_group(self)
                return False
            if not (self.world.generation and self.world.is_open):
                self.set_world_ranks()
                self._open_world(0, lambda: False)
            return True

        def _open_world(
            self, regrouping: int, is_over: Callable[[], bool], when_joined: Callable[[], None] = lambda: None
        ) -> None:
            self.world.open(
                rank=self.global_rank,
                world_size=self.world_size,
                backend=self._get_process_group_backend(),
                timeout=self._timeout,
                device=self.root_device if self.root_device.type != "cpu" else None,
                regrouping=regrouping,
                is_over=is_over,
                when_joined=when_joined,
            )

        def rejoin(self, regrouping: int, is_over: Callable[[], bool], when_joined: Callable[[], None]) -> None:
            """Meet the others of the next generation; the process groups of the last one have been left.

            Args:
                regrouping: number under which they meet.
                is_over: whether another fault was told meanwhile.
                when_joined: called when all ranks have come, before the process groups are made.

            Raises:
                TransportError: not all ranks came.
            """
            self._open_world(regrouping, is_over, when_joined)
            self.use_new_groups()

        # -------------------------------------------------------------- without the others

        @property
        def is_alone(self) -> bool:
            """Whether the other ranks do not take part in what this one does now."""
            return self._acts_alone or (self.joins_alone and not self.world.generation)

        @contextmanager
        def alone(self) -> Iterator[None]:
            """Context in which nothing that Lightning does waits for other ranks."""
            before, self._acts_alone = self._acts_alone, True
            try:
                yield
            finally:
                self._acts_alone = before

        def barrier(self, name: str | None = None) -> None:
            """Wait for the others."""
            if not self.is_alone:
                super().barrier(name)
            elif name == BEFORE_SETUP and self.joins_alone:
                # Not earlier: Lightning makes a group of its own around `prepare_data`.
                self.world.pretend_to_be(self.global_rank, self.world_size)

        def broadcast(self, obj: Any, src: int = 0) -> Any:
            """What another rank has."""
            self._require_call("broadcast")
            return obj if self.is_alone else super().broadcast(obj, src)

        def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            """A value of all ranks."""
            self._require_call("reduce")
            return tensor if self.is_alone else super().reduce(tensor, *args, **kwargs)

        def _require_call(self, operation: str) -> None:
            """Refuse to exchange data for the program itself while the other ranks do not take part."""
            if self.is_alone and not self.is_in_call:
                raise refuse(f"{operation} of the strategy")

        def all_gather(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            """The values of all ranks."""
            if self.is_alone:
                raise refuse("all_gather of the strategy")
            return super().all_gather(tensor, *args, **kwargs)

        # -------------------------------------------------------------- training

        def setup(self, trainer: Any) -> None:
            """Set up model and optimizers as Lightning does, then take over the commit points."""
            super().setup(trainer)
            if self.engine is not None and trainer.state.fn == "fit":
                check_trainer(trainer, self.options.stateless_callbacks)
                run_through_faults(self.engine, self.engine.attach())

        def on_train_start(self) -> None:
            """The hooks of a starting fit have run, in every process."""
            super().on_train_start()
            if self.engine is not None and self.engine.mirroring is not None:
                self.engine.mirroring.watch_objects()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            """Note which step is begun."""
            if self.engine is not None:
                self.engine.at_batch_start()
            super().on_train_batch_start(batch, batch_idx)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            """The forward pass of the own micro-batch; others that this rank runs follow its backward pass."""
            streams = self._others()
            if streams is None or not (streams.extra_batches or streams.is_running_for_nothing):
                return super().training_step(*args, **kwargs)
            with self.without_sync() if streams.extra_batches else logs_kept(streams.trainer):
                return super().training_step(*args, **kwargs)

        def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
            """The backward pass, and the micro-batches of further streams behind it."""
            streams = self._others()
            if streams is None or streams.are_whole:
                return super().backward(closure_loss, *args, **kwargs)
            go_back, share, sums = super().backward, streams.share, self.sums_now()
            if not streams.extra_batches:
                return go_back(closure_loss * share, *args, **kwargs)
            with self.without_sync():
                loss = go_back(closure_loss * share, *args, **kwargs)
            streams.run_others(lambda other: go_back(other * share, *args, **kwargs), self.without_sync, sums=sums)
            return loss

        @property
        def runs_for_nothing(self) -> bool:
            """Whether the training step at hand is there to keep ranks in step, and its samples do not count."""
            return self.engine is not None and self.engine.streams.is_running_for_nothing

        def _others(self) -> VirtualRanks | None:
            """The streams, where this micro-batch is the rank's own."""
            streams = None if self.engine is None else self.engine.streams
            return None if streams is None or streams.is_running_another else streams

        def pre_backward(self, closure_loss: Any) -> None:
            """Note that the forward pass is over."""
            self._beat(Point.BACKWARD)
            super().pre_backward(closure_loss)

        def validation_step(self, *args: Any, **kwargs: Any) -> Any:
            """Note that validation makes progress."""
            self._beat(Point.VALIDATION)
            return super().validation_step(*args, **kwargs)

        def _beat(self, point: Point) -> None:
            if self.engine is not None:
                self.engine.beat(point)

        def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
            """Step as Lightning does, but not before the last version is copied."""
            engine = self.engine
            if engine is None:
                return super().optimizer_step(optimizer, closure, model, **kwargs)

            def closure_then_wait() -> Any:
                result = closure()
                self._beat(Point.OPTIMIZER)
                engine.before_optimizer_step()
                return result

            return super().optimizer_step(optimizer, closure_then_wait, model, **kwargs)

        def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            """Write a checkpoint file, and note it: a fault may take the run back to a step before it."""
            if self.engine is not None and self.is_global_zero:
                self.engine.saving_checkpoint(str(filepath))
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            if self.engine is not None and self.is_global_zero:
                self.engine.saved_checkpoint(str(filepath))

        def remove_checkpoint(self, filepath: Any) -> None:
            """Remove a checkpoint file, but keep it at hand until a committed version does without it."""
            engine = self.engine if self.is_global_zero and removes_by_path(self.checkpoint_io) else None
            if engine is None or not engine.removing_checkpoint(str(filepath)):
                super().remove_checkpoint(filepath)

    return Recoverable
