"""What our strategies add to those of Lightning: the engine, and the recovery from lost ranks.

Strategies differ in how they wrap the model, in the process groups for that, and in what is identical on all ranks.
They override the methods in the section "what subclasses override"; everything else is implemented here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, ClassVar

from lightning_ckptless.configuration.documentation import documented
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.ddp import start_method_of
from lightning_ckptless.internals.lightning.process import prepare_without_group
from lightning_ckptless.internals.lightning.strategy import LightningStrategy
from lightning_ckptless.internals.lightning.virtual_ranks import logs_kept
from lightning_ckptless.membership.launch.config import Outcome
from lightning_ckptless.membership.worker.placeholder_group import refuse
from lightning_ckptless.membership.worker.process_groups import use_loopback_on_one_node, world_of_process
from lightning_ckptless.membership.worker.watcher import ThreadedWatcher
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.protocol.hang_detection import Point
from lightning_ckptless.protocol.time_account import TimeAccount
from lightning_ckptless.protocol.versions import Version
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks
from lightning_ckptless.trainer.outputs.checkpoint_files import removes_by_path
from lightning_ckptless.trainer.session.engine import Engine
from lightning_ckptless.trainer.strategy.compatibility import check_trainer
from lightning_ckptless.trainer.strategy.world_size import require_ranks

BEFORE_SETUP = "pre_setup"
"""Name of Lightning's barrier before the setup hooks of the user's model and datamodule."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a strategy class that `trainer` cannot import.

    Args:
        module: name of the module that defines the class, from which copies are created.
        launcher: makes the launcher of a strategy.
        observers: each makes a callback that observes a call of `fit`, or none.
        run_job: runs an agent in this process.
    """

    module: str
    launcher: Callable[[Any], Any]
    observers: tuple[Callable[[], Any], ...]
    run_job: Callable[..., Outcome]


@documented(CkptlessOptions)
class CkptlessMixin(LightningStrategy):
    """Fault tolerance for a strategy of Lightning, which follows in the order of bases.

    Args:
        **base_options: options of Lightning's own strategy.

    Raises:
        OptionsError: a value is out of range.
    """

    parts: ClassVar[Parts]

    def __init__(self, options: CkptlessOptions, **base_options: Any) -> None:
        super().__init__(**base_options)
        self.options = options
        self.start_method = start_method_of(self)
        self.has_restored_outcome = False
        self._virtual_rank: int | None = None
        self.engine: Engine | None = None
        self.world = world_of_process()
        self.watcher: ThreadedWatcher | None = None
        self.joins_alone = False
        self._acts_alone = False
        self._is_replaying = False
        self.obstacle_of_calls: str | None = None
        self.is_in_call = False
        self.probes: list[Callable[[str, Version], None]] = []

    @contextmanager
    def without_engine(self) -> Iterator[None]:
        """Context in which the strategy is plain data parallelism: no versions and no checkpoint tracking."""
        engine, self.engine = self.engine, None
        try:
            yield
        finally:
            self.engine = engine

    @property
    def time_account(self) -> TimeAccount | None:
        """Where the time of the current `fit` has gone until now, on this rank; None outside of `fit`."""
        if self.engine is None:
            return None
        return TimeAccount.from_dict(self.engine.session.report.time.state()["account"])

    # -------------------------------------------------------------- copies

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the module that defines the class: each distribution of Lightning has one of the same public name."""
        cls = type(self)
        if "parts" not in vars(cls):
            # A user's subclass can be found by its own name.
            return super().__reduce_ex__(protocol)
        return blank, (cls.parts.module, cls.__name__), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """State of the strategy without what ties it to the current run; that cannot be copied."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"engine": None, "watcher": None, "world": None, "probes": [], "_launcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.world = world_of_process()
        self._configure_launcher()

    # -------------------------------------------------------------- what subclasses override

    replicates = True
    """Whether all ranks hold identical values of everything that is neither sharded nor private to a rank."""

    def mesh_sizes(self) -> tuple[int, int] | None:
        """Ranks in each dimension of the device mesh; None without a mesh."""
        return None

    def check_options(self) -> None:
        """Validate the strategy's own options before anything is started.

        Raises:
            OptionsError: the options are invalid.
        """

    def obstacle_in_place(self) -> str | None:
        """Why a lost rank could not be replaced in place; None if it can."""
        return None

    def obstacle_to_another_world(self) -> str:
        """Why the model could not continue with another number of ranks; empty if it can."""
        return ""

    def use_new_groups(self) -> None:
        """Switch the model to the process groups of a new generation."""

    def place_among_virtual_ranks(self) -> tuple[int, int, int]:
        """This rank's index among the data-parallel ranks, their number, and how many ranks share one place."""
        return self.global_rank, self.world_size, 1

    def requested_virtual_ranks(self) -> int:
        """Number of virtual ranks when all requested ranks are present."""
        return int(self.num_nodes * self.num_processes)

    def without_sync(self) -> AbstractContextManager[Any]:
        """Context in which a backward pass does not reduce gradients over the ranks."""
        return nullcontext()

    def sums_now(self) -> bool:
        """Whether a backward pass currently reduces gradients over the ranks."""
        return True

    # -------------------------------------------------------------- processes

    def _configure_launcher(self) -> None:
        self._launcher = self.parts.launcher(self)

    def check_world(self) -> None:
        """Compare the requested number of ranks with the number that the agent started.

        Raises:
            OptionsError: the numbers differ.
        """
        require_ranks(nodes=self.num_nodes, per_node=self.num_processes, found=self.cluster_environment.world_size())

    def make_virtual_ranks(self, trainer: Any) -> VirtualRanks:
        """The virtual ranks that this rank runs at the start of a run."""
        place, places, width = self.place_among_virtual_ranks()
        count = self.requested_virtual_ranks() if self.options.elastic_batch == "keep" else places
        return VirtualRanks(trainer, count=count, place=place, places=places, width=width)

    @contextmanager
    def as_virtual_rank(self, virtual_rank: int) -> Iterator[None]:
        """Context in which dataloaders are set up for a virtual rank's share of the samples."""
        self._virtual_rank = virtual_rank
        try:
            yield
        finally:
            self._virtual_rank = None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Sampler arguments: the share of a virtual rank in training, this rank's own share otherwise."""
        place, places, _ = self.place_among_virtual_ranks()
        if self.engine is None or not self.engine.trainer.training:
            return {"num_replicas": places, "rank": place}
        virtual_rank, count = (
            place if self._virtual_rank is None else self._virtual_rank,
            self.engine.virtual_ranks.count,
        )
        return {"num_replicas": count, "rank": virtual_rank % count}

    def join_generation(self) -> bool:
        """Join the current generation, unless this process already has.

        A replacement skips this: it joins the survivors in the training loop.

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
        """Join the next generation; the process groups of the previous one have been left.

        Args:
            regrouping: number of the rendezvous.
            is_over: whether another fault was reported in the meantime.
            when_joined: called when all ranks have arrived, before the process groups are created.

        Raises:
            TransportError: not all ranks arrived.
        """
        self._open_world(regrouping, is_over, when_joined)
        self.use_new_groups()

    # -------------------------------------------------------------- acting without the other ranks

    @property
    def is_alone(self) -> bool:
        """Whether the other ranks do not take part in what this rank is doing."""
        return self._acts_alone or (self.joins_alone and not self.world.generation)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context in which Lightning's collectives do not wait for other ranks."""
        before, self._acts_alone = self._acts_alone, True
        try:
            yield
        finally:
            self._acts_alone = before

    def barrier(self, name: str | None = None) -> None:
        """Wait for the other ranks."""
        if not self.is_alone:
            super().barrier(name)
        elif name == BEFORE_SETUP and self.joins_alone:
            # Not earlier: Lightning creates its own process group for `prepare_data`.
            self.world.pretend_to_be(self.global_rank, self.world_size)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object from rank `src`; returns this rank's own object while it acts alone."""
        self._require_call("broadcast")
        return obj if self.is_alone else super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor over all ranks; returns it unchanged while this rank acts alone or runs a step again."""
        self._require_call("reduce")
        return tensor if self.is_alone or self._is_replaying else super().reduce(tensor, *args, **kwargs)

    def _require_call(self, operation: str) -> None:
        """Refuse a collective that the script requests while the other ranks do not take part."""
        if self.is_alone and not self.is_in_call:
            raise refuse(f"{operation} of the strategy")

    def all_gather(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Gather a tensor from all ranks."""
        if self.is_alone:
            raise refuse("all_gather of the strategy")
        return super().all_gather(tensor, *args, **kwargs)

    # -------------------------------------------------------------- training

    def setup(self, trainer: Any) -> None:
        """Set up model and optimizers as Lightning does, then attach the engine and the recovery loop."""
        super().setup(trainer)
        if self.engine is not None and trainer.state.fn == "fit":
            check_trainer(trainer, self.options)
            self.engine.attach()

    def on_train_start(self) -> None:
        """Start watching objects for changes: the hooks of a starting fit have run in every process."""
        super().on_train_start()
        if self.engine is not None:
            self.engine.on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Record which step has begun."""
        if self.engine is not None:
            self.engine.at_batch_start(batch)
        super().on_train_batch_start(batch, batch_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of this rank's own micro-batch; those of other virtual ranks follow its backward."""
        virtual_ranks = self._others()
        if virtual_ranks is None or not (virtual_ranks.extra_batches or virtual_ranks.is_padding):
            return super().training_step(*args, **kwargs)
        with self.without_sync() if virtual_ranks.extra_batches else logs_kept(virtual_ranks.trainer):
            return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the backward pass, then the micro-batches of further virtual ranks."""
        virtual_ranks = self._others()
        if virtual_ranks is None or virtual_ranks.are_whole:
            return super().backward(closure_loss, *args, **kwargs)
        backward, share, sums = super().backward, virtual_ranks.share, self.sums_now()
        if not virtual_ranks.extra_batches:
            return backward(closure_loss * share, *args, **kwargs)
        with self.without_sync():
            loss = backward(closure_loss * share, *args, **kwargs)
        virtual_ranks.run_others(lambda other: backward(other * share, *args, **kwargs), self.without_sync, sums=sums)
        return loss

    @property
    def is_padding_batch(self) -> bool:
        """Whether the current training step is padding, which keeps the ranks in lockstep: its samples do not count."""
        return self.engine is not None and self.engine.virtual_ranks.is_padding

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Context in which this rank runs a training step by itself: not wrapped, and without reducing what it logs."""
        wrapped, self.model, self._is_replaying = self.model, self.lightning_module, True
        try:
            yield
        finally:
            self.model, self._is_replaying = wrapped, False

    def _others(self) -> VirtualRanks | None:
        """The virtual ranks, if this micro-batch is the rank's own; None otherwise."""
        virtual_ranks = None if self.engine is None else self.engine.virtual_ranks
        return None if virtual_ranks is None or virtual_ranks.is_running_another else virtual_ranks

    def pre_backward(self, closure_loss: Any) -> None:
        """Report that the forward pass is complete."""
        if self.engine is not None:
            self.engine.before_backward()
        super().pre_backward(closure_loss)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Report progress in validation."""
        self._beat(Point.VALIDATION)
        return super().validation_step(*args, **kwargs)

    def _beat(self, point: Point) -> None:
        if self.engine is not None:
            self.engine.beat(point)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step as Lightning does, but only after the previous version has been copied."""
        engine = self.engine
        if engine is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

        def closure_then_wait() -> Any:
            result = closure()
            self._beat(Point.OPTIMIZER)
            engine.before_optimizer_step()
            return result

        return super().optimizer_step(optimizer, closure_then_wait, model, **kwargs)

    def rewind(self, *, to_step: int | None = None, steps: int | None = None, skip_batches: int | None = 0) -> None:
        """Request that all ranks go back to an earlier step, which the history must contain.

        May be called in any hook of training or validation, on any rank. All ranks decide together within the next
        steps: the earliest target counts. During a recovery the decision waits for its end.

        Args:
            to_step: optimizer step to return to (`trainer.global_step` at that time); the newest version of the history
                that is not after it.
            steps: number of optimizer steps to go back instead.
            skip_batches: batches of each rank to skip from there on, as if the sampler had not produced them; None for
                all up to the current one.

        Raises:
            OptionsError: the strategy keeps no history, no such step exists, or batches of this dataloader cannot be
                skipped.
        """
        self.ask_to_rewind("requested by the script", to_step=to_step, steps=steps, skip_batches=skip_batches)

    def ask_to_rewind(self, cause: str, *, to_step: int | None, steps: int | None, skip_batches: int | None) -> None:
        """Request a rewind as `rewind` does.

        Args:
            cause: who requests it, and why.
            to_step: see `rewind`.
            steps: see `rewind`.
            skip_batches: see `rewind`.
        """
        if self.engine is None or self.engine.running is None:
            raise OptionsError("rewind() was called outside of `fit`: call it in a hook of training or validation")
        self.engine.running.rewinding.ask(to_step=to_step, steps=steps, skip_batches=skip_batches, cause=cause)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint file and record it: a fault may roll the run back to an earlier step."""
        if self.engine is not None and self.is_global_zero:
            self.engine.saving_checkpoint(str(filepath))
        with nullcontext() if self.engine is None else self.engine.writing_checkpoint():
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        if self.engine is not None and self.is_global_zero:
            self.engine.saved_checkpoint(str(filepath))

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint file, but keep a copy until a committed version includes the removal."""
        engine = self.engine if self.is_global_zero and removes_by_path(self.checkpoint_io) else None
        if engine is None or not engine.removing_checkpoint(str(filepath)):
            super().remove_checkpoint(filepath)


def options_of(arguments: Mapping[str, Any]) -> CkptlessOptions:
    """Return the options among the arguments of a constructor.

    Raises:
        OptionsError: a value is out of range.
    """
    return CkptlessOptions(**{field.name: arguments[field.name] for field in fields(CkptlessOptions)})


def blank(module: str, name: str) -> Any:
    """Create an uninitialized strategy that a copy is filled into.

    Args:
        module: module that defines the class.
        name: name of the class.
    """
    cls = getattr(import_module(module), name)
    return cls.__new__(cls)
