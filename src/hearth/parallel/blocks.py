"""The parts of a decoder layer under tensor parallelism, and sequence parallelism between them.

A block is a part of a layer that has matrices that are cut: attention, the feed-forward. In most families a
process computes a summand of a block's result from the block's input alone, so that two exchanges are enough,
one at each end (Shoeybi et al. 2019, "Megatron-LM", section 3). With ``sequence`` the processes have
different positions of what is between the blocks: norms, residuals, dropout. Then all positions are gathered
where a block begins, and sums are scattered where it ends (Korthikanti et al. 2022, "Reducing activation
recomputation in large transformer models", section 4.2.2).

Other blocks (routers of experts, latents of attention, outputs that are gathered) have their exchanges inside
and give the same result in every process; of which each takes its positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.exchange import (
    Bound,
    Group,
    add_up,
    copy_to,
    gather_positions,
    gather_to_sum,
    scatter_sum,
    split_positions,
)
from hearth.parallel.pipeline import divide_layers
from hearth.parallel.styles import Exchange, Style, as_is

Styles = Mapping[str, Style]
_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Block:
    """A part of a layer. ``sums``: processes compute summands, exchanged at its two ends alone."""

    path: str
    module: nn.Module
    sums: bool


def find_blocks(layers: Mapping[str, nn.Module], styles: Styles) -> list[Block]:
    """Blocks of the layers of a decoder; everything by its path."""
    found = []
    for path, layer in layers.items():
        for name, module in layer.named_children():
            own = f"{path}.{name}"
            if not any(True for _ in module.parameters()) or _is_norm(module):
                continue
            found.append(Block(own, module, _gives_summands(own, module, styles)))
    return found


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def _gives_summands(path: str, block: nn.Module, styles: Styles) -> bool:
    """Whether all of a block is cut by columns first and by rows at the end."""
    columns = rows = 0
    for name, module in block.named_modules():
        if all(weight is None for weight in module._parameters.values()):
            continue
        style = styles.get(f"{path}.{name}" if name else path)
        if style is None:
            return False
        if _by_columns(style):
            columns += 1
        elif _by_rows(style):
            rows += 1
        elif not style.sum_gradients:
            return False
    return columns > 0 and rows == 1


def _by_columns(style: Style) -> bool:
    return style.dimension is not None and style.before is copy_to and style.after is as_is


def _by_rows(style: Style) -> bool:
    return style.dimension is not None and style.before is as_is and style.after is add_up


def styles_within(blocks: Iterable[Block], styles: Styles, *, sequence: bool) -> dict[str, Style]:
    """The styles of all modules, where blocks that give summands exchange at their ends alone."""
    found = dict(styles)
    for block in blocks:
        for path in styles if block.sums else ():
            if not path.startswith(f"{block.path}."):
                continue
            if _by_columns(styles[path]):
                found[path] = dataclasses.replace(styles[path], before=as_is)
            elif _by_rows(styles[path]) and sequence:
                found[path] = dataclasses.replace(styles[path], after=scatter_sum)
    return found


def norms_between(layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths of the norms between blocks, which see the positions of one process."""
    for path, layer in layers.items():
        for name, module in layer.named_children():
            if _is_norm(module):
                yield f"{path}.{name}"


def wrap_blocks(blocks: Iterable[Block], group: Group, *, sequence: bool) -> None:
    """Let blocks exchange at their ends."""
    for block in blocks:
        module: Any = block.module
        if block.sums:
            module.forward = Bound(_through, module, gather_to_sum if sequence else copy_to, as_is, group)
        elif sequence:
            module.forward = Bound(_through, module, gather_positions, split_positions, group)


def wrap_layers(layers: Mapping[str, nn.Module], section: ParallelSection, group: Group) -> None:
    """Split positions before the first layer of each stage of a pipeline, and gather them after the last."""
    if not layers:
        raise ConfigError(
            "parallel.sequence: this model has no list of decoder layers", fix="set parallel.sequence: false"
        )
    stages = divide_layers(len(layers), section.pipeline * section.stages)
    first, last = {stage.start for stage in stages}, {stage.stop - 1 for stage in stages}
    for index, layer in enumerate(layers.values()):
        if any(weight is not None for weight in layer._parameters.values()):
            raise ConfigError(
                f"parallel.sequence: layers of this model ({type(layer).__name__}) have weights between "
                "their blocks",
                fix="set parallel.sequence: false",
            )
        for module in layer.children():
            if type(module) is nn.Dropout:
                dropout: Any = module
                dropout.forward = Bound(_drop_out, dropout, group)
        before = _split_checked if index in first else as_is
        after = gather_positions if index in last else as_is
        if index in first | last:
            wrapped: Any = layer
            wrapped.forward = Bound(_through, wrapped, before, after, group)


def _drop_out(module: nn.Dropout, forward: Callable[[Tensor], Tensor], group: Group, input: Tensor) -> Tensor:
    """Dropout as one process draws it for all positions: parts that draw alike would drop alike."""
    if not module.training or module.p == 0.0:
        return forward(input)
    size, rank = group.size(), group.rank()
    kept = forward(input.new_ones(input.shape[0], size * input.shape[1], *input.shape[2:]))
    own: Tensor = input * kept.chunk(size, dim=1)[rank]
    return own


def _split_checked(x: Tensor, group: Group) -> Tensor:
    if x.ndim != 3 or x.shape[1] % group.size():
        raise ConfigError(
            f"parallel.sequence: hidden states of shape {tuple(x.shape)} cannot be split by position (the "
            f"second) over {group.size()} processes",
            fix=f"use a data.sequence_length of which a process has a multiple of {group.size()} positions, "
            "or parallel.sequence: false",
        )
    return split_positions(x, group)


def _through(
    module: nn.Module,  # noqa: ARG001
    forward: Callable[..., Any],
    before: Exchange,
    after: Exchange,
    group: Group,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``forward`` with hidden states, its first argument, exchanged before, and its first result after."""
    if _HIDDEN in kwargs:
        kwargs[_HIDDEN] = before(kwargs[_HIDDEN], group)
    else:
        args = (before(args[0], group), *args[1:])
    if before is _split_checked:
        _require_no_others(args, kwargs)
    found = forward(*args, **kwargs)
    return (after(found[0], group), *found[1:]) if isinstance(found, tuple) else after(found, group)


def _require_no_others(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError for layers that take more values for each position than the hidden states."""
    others = [*args[1:], *(value for name, value in kwargs.items() if name != _HIDDEN)]
    tensors = [other for other in others if isinstance(other, Tensor) and other.is_floating_point()]
    if any(tensor.ndim == 3 for tensor in tensors):
        raise ConfigError(
            "parallel.sequence: layers of this model take more than the hidden states of a position",
            fix="set parallel.sequence: false",
        )
