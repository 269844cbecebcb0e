"""Weights, gradients and optimizer state shared out by DeepSpeed instead of torch: ZeRO-Infinity.

Rajbhandari et al. 2021, "ZeRO-Infinity": stage 3 of ZeRO whose parts rest in the memory of the host or on a
disk. The loop stays Hearth's own: it calls forward and backward passes through the engine, asks for the norm
of the gradients, and lets DeepSpeed clip and update.

Where DeepSpeed has no public way (the norm before the update, states without reading a whole sub-group for
every weight) its stage 3 optimizer is used directly, which is why its version is pinned.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError, IntegrityError, ModelError
from hearth.models.in_parts import Source
from hearth.parallel.deepspeed_config import Sizes, deepspeed_config
from hearth.parallel.filling import meta_tensors
from hearth.parallel.meeting import leave
from hearth.parallel.sharding import LossModule, decoder_layers
from hearth.parallel.world import World

EXTRA = "deepspeed"
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedModule(LossModule):
    """``module(function, *inputs)`` is ``function(model, *inputs)``, with weights that DeepSpeed gathers.

    Made, it shares out the weights, one by one; `start` makes the engine, with an optimizer of those weights.
    ``source``: of a model on the meta device, where its weights come from: no process ever has them all.
    Raises ConfigError for a layout, a model or a computer that cannot do it.
    """

    def __init__(
        self, model: nn.Module, world: World, section: ParallelSection, source: Source | None = None
    ) -> None:
        super().__init__(model)
        _require_supported(model, world, section)
        self._library = _library(world)
        self._world, self._section = world, section
        self._folder = None if section.offload != "nvme" else _make_folder(self._library, world, section)
        weights = list(model.parameters())
        self._sizes = Sizes(
            hidden=int(_text_config(model).hidden_size),
            total=sum(weight.numel() for weight in weights),
            largest=max(weight.numel() for weight in weights),
            num_layers=max(1, len(decoder_layers(model))),
        )
        self._engine: Any = None
        sharing = self._library.zero.Init(
            module=nn.Module(), config_dict_or_path=self._config(0.0), dtype=torch.float32
        )
        sharing._convert_to_zero_parameters([weight for weight in weights if not weight.is_meta])
        if source is not None:
            self._fill(source, sharing)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(world.device)

    def _fill(self, source: Source, sharing: Any) -> None:
        """Give what is on the meta device the values of ``source``, and share it out at once."""
        owners: dict[str, list[Tensor]] = {}
        for name, tensor in meta_tensors([self.model]):
            owners.setdefault(name, []).append(tensor)
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for part in self.model.modules():
            for holder in (part._parameters, part._buffers):
                for key, value in holder.items():
                    places.setdefault(id(value), []).append((holder, key))
        wanted = set(owners)
        for name, found in source.tensors(wanted):
            for tensor in {id(each): each for each in owners.pop(name, [])}.values():
                if id(tensor) not in places:  # tied, and filled by its other name
                    continue
                made: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._world.device)
                if self._world.is_main or not isinstance(tensor, nn.Parameter):
                    made.copy_(found[:] if tensor.ndim else found[...])
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    sharing._convert_to_zero_parameters([made])  # the values of the first process
                for holder, key in places.pop(id(tensor)):
                    holder[key] = made
        absent = sorted(
            name for name, tensors in owners.items() if any(id(each) in places for each in tensors)
        )
        if absent:
            raise ModelError(f"there are no values for {absent[0]} and {len(absent) - 1} other weights")

    def _config(self, grad_clip: float) -> dict[str, Any]:
        return deepspeed_config(
            self._section,
            self._sizes,
            num_processes=self._world.size,
            grad_clip=grad_clip,
            folder=None if self._folder is None else str(self._folder),
        )

    def start(self, optimizer: torch.optim.Optimizer, *, grad_clip: float) -> None:
        """Hand the optimizer over. ``grad_clip``: largest norm; 0 does not clip."""
        self._engine, *_ = self._library.initialize(
            model=LossModule(self.model),
            optimizer=optimizer,
            config=self._config(grad_clip),
            dist_init_required=False,
        )

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer of stage 3, around the one that was handed over."""
        return self._engine.optimizer

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(model, *inputs)``; what has a gradient of it is in tensors, dicts or tuples."""
        kind = self._world.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def run(model: nn.Module, *given: Any) -> Any:
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                return function(model, *given)

        self._engine.set_gradient_accumulation_boundary(self.is_last)
        # The engine turns autocast off around the model, as its own is off.
        with torch.autocast(kind, enabled=False):
            return self._engine(run, *inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss: added up over processes, not averaged."""
        self._engine.backward(loss * self._world.size)

    def norm(self) -> Tensor:
        """The norm of all gradients of the step, before the update; inf where it is not finite."""
        utils: Any = importlib.import_module("deepspeed.runtime.utils")
        found: Tensor = utils.combine_grad_norm_groups(self.optimizer._get_norm_groups())
        return found.double() / float(self.optimizer.loss_scale)

    def scale(self, factor: float) -> None:
        """Multiply the gradients of the step; the next `norm` and `update` count with it."""
        self.optimizer.override_loss_scale(1.0 / factor)

    def update(self) -> None:
        """Clip the gradients and change the weights."""
        self._engine.step()
        self.optimizer.override_loss_scale(1.0)

    def discard(self) -> None:
        """Forget the gradients of the step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.override_loss_scale(1.0)

    # ── what a checkpoint holds ──────────────────────────────────────────────────────────────────────────

    def whole_weights(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of ``names``, whole, in the first process; their shapes alone (meta) in the others."""
        found = {}
        for name, tensor in names.items():
            with self._gathered(tensor):
                found[name] = self._kept(name, tensor.detach())
        return found

    def load_weights(self, weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """Copy ``saved`` into the weights: those that are computed with, and those that are updated."""
        for name, tensor in weights.items():
            with self._gathered(tensor, changes=True), torch.no_grad():
                if self._world.is_main or not hasattr(tensor, "ds_id"):
                    tensor.copy_(saved[name])
        for _, master, members in self._sub_groups(changes=True):
            for name, _, offset, size in members:
                master.detach()[offset : offset + size].copy_(self._own_part(saved[name], size))

    def whole_states(self) -> dict[str, Tensor]:
        """``WEIGHT|KEY`` of what the optimizer remembers, as `whole_weights` gives weights."""
        found = {}
        for state, _, members in self._sub_groups():
            for name, weight, offset, size in members if state else ():
                found[f"{name}|step"] = self._kept(f"{name}|step", state["step"])
                for key in MOMENTS:
                    part = state[key][offset : offset + size].contiguous()
                    whole = self._to_main(part, weight)
                    found[f"{name}|{key}"] = self._kept(f"{name}|{key}", whole)
        return found

    def load_states(self, saved: Mapping[str, Tensor]) -> None:
        """The reverse of `whole_states`, of any layout. Raises IntegrityError for those of other weights."""
        if not saved:
            return
        states = self.optimizer.optimizer.state
        for _, master, members in self._sub_groups(changes=True):
            steps = {float(saved[f"{name}|step"]) for name, *_ in members if f"{name}|step" in saved}
            if len(steps) != 1 or any(
                f"{name}|{key}" not in saved for name, *_ in members for key in MOMENTS
            ):
                raise IntegrityError(
                    f"the checkpoint has no AdamW state, of one and the same step, for {members[0][0]} "
                    "and the weights beside it",
                    fix="resume with parallel.engine: native, or start a new run from its model",
                )
            state = {"step": torch.tensor(steps.pop(), dtype=torch.float32, device=master.device)}
            for key in MOMENTS:
                state[key] = torch.zeros_like(master)
                for name, _, offset, size in members:
                    part = self._own_part(saved[f"{name}|{key}"], size)
                    state[key][offset : offset + size].copy_(part)
            if master in states and all(key in states[master] for key in MOMENTS):
                for key, value in state.items():
                    states[master][key].copy_(value)
            else:
                states[master] = state

    def _sub_groups(
        self, *, changes: bool = False
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, list[tuple[str, Any, int, int]]]]:
        """State, weights and members (name, weight, offset, size) of every sub-group, read from the disk."""
        optimizer = self.optimizer
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        for index, weights in enumerate(optimizer.fp16_groups):
            members = []
            for weight in weights:
                _, offset, size = optimizer.grad_position[optimizer.get_param_id(weight)]
                members.append((names[id(weight)], weight, offset, size))
            swapped = optimizer._swappable_optimizer_subgroup(index)
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_in(index)
            master = optimizer.fp32_partitioned_groups_flat[index]
            with torch.no_grad():
                yield optimizer.optimizer.state.get(master, {}), master, members
            if swapped and changes:
                optimizer._optimizer_states_and_gradient_swap_out(index)
            elif swapped:
                optimizer._release_swap_buffers(index)

    def _own_part(self, whole: Tensor, size: int) -> Tensor:
        """What of a flattened weight this process has; zeros behind its end."""
        flat = whole.flatten()[self._world.rank * size : (self._world.rank + 1) * size]
        return torch.nn.functional.pad(flat.float(), (0, size - flat.numel()))

    def _to_main(self, part: Tensor, weight: Any) -> Tensor:
        """A tensor of the shape of ``weight`` from the parts of all; valid in the first process."""
        main = self._world.is_main
        parts = [torch.empty_like(part) for _ in range(self._world.size)] if main else None
        dist.gather(part, parts, dst=0)
        if parts is None:
            return torch.empty(weight.ds_shape, dtype=part.dtype, device="meta")
        return torch.cat(parts)[: weight.ds_numel].view(weight.ds_shape)

    def _gathered(self, tensor: Any, *, changes: bool = False) -> contextlib.AbstractContextManager[Any]:
        if not hasattr(tensor, "ds_id"):  # a buffer
            return contextlib.nullcontext()
        gathered: contextlib.AbstractContextManager[Any] = self._library.zero.GatheredParameters(
            [tensor], modifier_rank=0 if changes else None
        )
        return gathered

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in the first process; with offload: nvme in a file, as memory would not hold them all."""
        if not self._world.is_main:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if self._folder is None or not tensor.numel():
            return tensor.detach().to("cpu", copy=True)
        file = self._folder / f"{name.replace('|', '-')}.checkpoint"
        size, shape = tensor.numel(), tensor.shape
        kept = torch.from_file(str(file), shared=True, size=size, dtype=tensor.dtype)
        return kept.copy_(tensor.flatten()).view(shape)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _require_supported(model: nn.Module, world: World, section: ParallelSection) -> None:
    layout = world.layout
    if layout.shard != world.size:
        raise ConfigError(
            f"parallel.engine deepspeed shares weights over all processes, not {layout}",
            fix=f"set parallel.shard: {world.size} and leave the other sizes at 1",
        )
    if section.zero != 3:
        raise ConfigError(
            f"parallel.zero {section.zero}: parallel.engine deepspeed shares everything",
            fix="use zero: 3, or engine: native",
        )
    if section.reduce == "powersgd":
        raise ConfigError(
            "parallel.reduce powersgd: parallel.engine deepspeed does not have it", fix="use fp32 or bf16"
        )
    other = next((name for name, weight in model.named_parameters() if weight.dtype != torch.float32), None)
    if other is not None:
        raise ConfigError(
            f"parallel.engine deepspeed takes float32 weights; {other} is {model.get_parameter(other).dtype}",
            fix="leave model.adapter.quantize at none, or use engine: native",
        )


def _library(world: World) -> Any:
    """DeepSpeed, told of the device and of the processes that there are."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))
    try:
        library: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            f"parallel.engine deepspeed needs the library deepspeed: {error}",
            fix=f"pip install 'hearth-lm[{EXTRA}]', or use engine: native",
        ) from error
    if not library.__version__.startswith("0.19."):
        raise ConfigError(
            f"parallel.engine deepspeed: DeepSpeed {library.__version__} is installed, Hearth knows 0.19",
            fix=f"pip install 'hearth-lm[{EXTRA}]'",
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # a process alone
        store = importlib.import_module("torch.distributed").HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(_leave)
    library.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return library


def _leave() -> None:
    if dist.is_initialized():
        leave()


def _make_folder(library: Any, world: World, section: ParallelSection) -> Path:
    """A folder of this run alone in ``offload_dir``, removed when the process ends."""
    # Ninja may lie beside a Python that was started by its path.
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
    builder = library.ops.op_builder.AsyncIOBuilder()
    if not builder.is_compatible():
        raise ConfigError(
            "parallel.offload nvme: DeepSpeed cannot compile its asynchronous input and output here",
            fix="install a C++ compiler and libaio with its headers (libaio-dev, libaio-devel), or use "
            "offload: cpu",
        )
    world.main_first(lambda: builder.load(verbose=False))  # compiled once, in a minute or so
    folder = Path(str(section.offload_dir)) / f"hearth-{world.from_main(uuid.uuid4().hex[:12])}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"parallel.offload_dir {section.offload_dir} cannot be used: {error}",
            fix="name a folder on a fast disk that can be written to",
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
