"""Several processes that train one model: who holds which rows and pieces, and what they say to each other.

The engine is PyTorch's own: torchrun starts the processes; DistributedDataParallel, `fully_shard` (FSDP2) or, for
weights with masters, one all-reduce averages the gradients; `context` adds the cut of the rows. The model stays a plain
model, transformed from outside; one process alone goes through the same calls, which then do nothing.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from receptance.errors import ConfigError
from receptance.models import RWKV, State
from receptance.ops import Operators
from receptance.training.batch import Batch
from receptance.training.config import TrainConfig
from receptance.training.context import ContextParallel

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # the others wait so long while the first one tokenises or saves


def started_rank() -> int:
    """This process's rank as its launcher says (torchrun and Ray set RANK); 0 without one."""
    return int(os.environ.get("RANK", "0"))


def precision(config: TrainConfig, device: torch.device) -> str:
    """Of matrix products: "float32" or "bfloat16"."""
    if config.run.precision != "auto":
        return config.run.precision
    return "bfloat16" if device.type == "cuda" else "float32"


class Parallel:
    """One process among those of a run. Ranks are counted row group by row group: context ranks are neighbours."""

    def __init__(self, config: TrainConfig, device: torch.device):
        """Joins the group that the launcher prepared, if there is one. Raises ConfigError if the numbers do not fit."""
        self.config = config
        self.device = device
        self.rank, self.size = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.talk: dist.ProcessGroup | None = None  # between CPUs, for decisions and checkpoints
        self.ranks: ContextParallel | None = None
        if self.size > 1:
            self._join()
        self._check()
        if config.parallel.context > 1:
            groups = torch.arange(self.size).view(-1, config.parallel.context).tolist()
            group, _ = dist.new_subgroups_by_enumeration(groups)
            assert group is not None
            self.ranks = ContextParallel(group)

    def _join(self) -> None:
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.rank = dist.get_rank()
        # groups of its own: a checkpoint may be written in the background while training talks
        self.talk = dist.new_group(backend="gloo", timeout=PATIENCE)

    def _check(self) -> None:
        parallel, run = self.config.parallel, self.config.run
        rows, rest = divmod(self.size, parallel.context)
        if rest:
            raise ConfigError(
                f"parallel.context = {parallel.context} does not divide {self.size} processes; start this with "
                "torchrun --nproc-per-node, or change it"
            )
        if run.batch_size % (rows * run.accumulate):
            raise ConfigError(
                f"run.batch_size = {run.batch_size} is not a multiple of {rows} processes with rows of their own × "
                f"run.accumulate = {run.accumulate}"
            )
        if parallel.shard_size and self.size % parallel.shard_size:
            raise ConfigError(f"parallel.shard_size = {parallel.shard_size} does not divide {self.size} processes")
        if run.ctx_len < parallel.context:
            raise ConfigError(f"run.ctx_len = {run.ctx_len} leaves none for some of {parallel.context} processes")
        if parallel.context > 1 and run.segment_len:
            for name, whole, part in (
                ("run.ctx_len", run.ctx_len, run.segment_len), ("run.segment_len", run.segment_len, parallel.context)
            ):  # fmt: skip
                if whole % part:
                    raise ConfigError(f"{name} = {whole} must be a multiple of {part} when rows are cut over processes")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        return self.size > 1 and self.config.parallel.kind == "fsdp"

    @property
    def gathers_half(self) -> bool:
        """Whether shards, float32 themselves, are gathered as bfloat16, so that blocks see weights of that type.

        Gradients leave a block in bfloat16 and are averaged and added up in float32, however many passes a step has.
        """
        return (
            self.is_sharded
            and self.config.run.weights == "bfloat16"
            and precision(self.config, self.device) == "bfloat16"
        )

    @property
    def operators(self) -> str | Operators:
        """The back end for the training pass."""
        return self.ranks or "auto"

    def shard(self, model: RWKV) -> RWKV:
        """The model, ready for this kind of run; its parameters are replaced, so the optimiser comes after this.

        fsdp: each block is one unit of gathering, and the frame (embedding, last norm, head) is another, which stays
        whole from the forward pass to the backward pass, so that a loss may use the head's weights.
        """
        if not self.is_sharded:
            return model.to(self.device)
        if getattr(model.config, "time_state", False):
            raise ConfigError("a model with a tuned initial state cannot be sharded; use parallel.kind = 'ddp'")
        shard_size = self.config.parallel.shard_size or self.size
        shape: tuple[int, ...] = (self.size,)
        if shard_size < self.size:
            shape = (self.size // shard_size, shard_size)  # replicate × shard: HSDP
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        policy = MixedPrecisionPolicy()
        if self.gathers_half:  # what a block is given stays as it is: WKV states are float32
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # none is changed
        fully_shard(
            model.blocks[0].get_submodule("ln0"), mesh=mesh, mp_policy=policy
        )  # used by the frame, before the block it belongs to
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        register_fsdp_forward_method(model, "hidden")  # what all uses of the model go through
        return model

    def replicate(self, module: nn.Module, model: RWKV) -> nn.Module:
        """`module`, which calls `model` in its forward, with averaging of gradients where nothing else does it.

        Shards do it themselves; an optimiser with masters has all gradients in one buffer, which `average` takes.
        """
        if self.size == 1 or self.is_sharded or model.dtype == torch.bfloat16:
            return module
        unused = bool(getattr(model.config, "first_value", False))  # tensors of some RWKV-7 files that nothing reads
        return DistributedDataParallel(module, find_unused_parameters=unused)

    def averaging(self, module: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around a forward and backward pass; of the passes of a step only the `last` averages over processes."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return nullcontext()  # FSDP scatters each pass's gradients: adding them up whole would cost the memory it saves

    def share(self, batch: Batch) -> Batch:
        """This process's rows and positions of a step: together, all have what one process alone would."""
        context, segment = self.config.parallel.context, self.config.run.segment_len
        batch = batch.rows(self.size // context)[self.rank // context]
        if self.ranks is None:
            return batch
        places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        pieces = places.split(segment or len(places))
        return batch.positions(torch.cat([piece.tensor_split(context)[self.ranks.rank] for piece in pieces]))

    def handed_on(self, state: State) -> State:
        """The state after a segment, for the one after it."""
        return state if self.ranks is None else self.ranks.last_state(state)

    def mean(self, x: Tensor) -> Tensor:
        """Over all processes."""
        if self.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x / self.size

    def average(self, x: Tensor) -> None:
        """Over all processes, in place."""
        if self.size == 1:
            return
        if x.is_cuda:
            dist.all_reduce(x, dist.ReduceOp.AVG)
        else:  # which gloo cannot
            dist.all_reduce(x.div_(self.size))

    def agree(self, value: T, group: dist.ProcessGroup | None = None) -> T:
        """The first process's value, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=group or self.talk)
        return box[0]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block alone, then the others, who find its work done."""
        if self.is_first:
            done = False
            try:
                yield
                done = True
            finally:
                self.agree(done)
        else:
            if not self.agree(False):
                raise ConfigError("the first process could not prepare the run; see its message")
            yield

    def whole(self, model: RWKV) -> dict[str, Tensor]:
        """The model's tensors in full, on the first process in main memory; all processes must call this."""
        if not self.is_sharded:
            return {name: x.detach() for name, x in model.state_dict().items()}
        tensors = {}
        for name, x in model.state_dict().items():
            full = x.full_tensor() if isinstance(x, DTensor) else x
            if self.is_first:
                tensors[name] = full.detach().cpu()
        return tensors

    def whole_model(self, model: RWKV) -> RWKV | None:
        """A plain model to generate with, on the first process alone; all processes must call this."""
        if not self.is_sharded:
            return model if self.is_first else None
        tensors = self.whole(model)
        if not self.is_first:
            return None
        plain: RWKV = type(model)(model.config, device=str(self.device))  # type: ignore[call-arg]
        plain.load_state_dict(tensors)
        return plain.eval()

    def settle(self, model: RWKV) -> None:
        """After passes without a backward pass: let go of gathered weights, which the next update makes stale."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local(x: Tensor) -> Tensor:
    """A norm of sharded gradients as a plain tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x
