"""From the setting ``speculation`` to a `Speculator`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hearth.engine import support
from hearth.engine.assembly import assemble
from hearth.engine.config import EngineConfig
from hearth.engine.draft.drafter import Drafter
from hearth.engine.draft.model import ModelDrafter
from hearth.engine.draft.ngram import NgramDrafter
from hearth.engine.draft.speculator import Speculator
from hearth.engine.loading import LoadedModel, load
from hearth.engine.request import Request
from hearth.engine.scheduler import Scheduler
from hearth.errors import ConfigError

NGRAM = "ngram"


def open_draft_model(target: LoadedModel, config: EngineConfig) -> LoadedModel | None:
    """The draft model that ``config`` names, on the target's device; None without one.

    Raises `ConfigError` if its vocabulary is another, and what `load` raises.
    """
    if config.speculation is None or config.speculation == NGRAM:
        return None
    draft = load(config.speculation, config.with_(device=str(target.model.device), tensor_parallel=1))
    sizes = [_text_config(each).vocab_size for each in (draft, target)]
    fix = "draft with a model that was made with the same tokenizer, or use speculation 'ngram'"
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the draft model {config.speculation} has a vocabulary of {sizes[0]} tokens, the model one of "
            f"{sizes[1]}",
            fix=fix,
        )
    if draft.tokenizer is not None and target.tokenizer is not None:
        drafts, targets = draft.tokenizer.get_vocab(), target.tokenizer.get_vocab()
        if drafts != targets:
            token = min(token for token, _ in drafts.items() ^ targets.items())
            raise ConfigError(
                f"the draft model {config.speculation} has other tokens than the model: {token!r} is "
                f"{drafts.get(token)} there and {targets.get(token)} here",
                fix=fix,
            )
    return draft


def bytes_per_token(draft: LoadedModel | None, config: EngineConfig) -> int:
    """What the keys and values of the draft model add to each token of the pool."""
    if draft is None:
        return 0
    specs = support.examine(draft.model)
    return sum(spec.bytes_per_token(draft.model.dtype, config.kv_dtype) for _, spec in specs)


def make_speculator(
    draft: LoadedModel | None,
    config: EngineConfig,
    scheduler: Scheduler,
    max_model_len: int,
    num_valid: Callable[[Request], int],
) -> Speculator | None:
    """What ``config.speculation`` asks for; None if nothing. Changes ``draft.model`` in place."""
    if config.speculation is None:
        return None
    drafter: Drafter
    if draft is None:
        drafter = NgramDrafter()
    else:
        limit = support.context_limit(_text_config(draft))
        bears = max_model_len if limit is None else min(limit, max_model_len)
        settings = config.with_(max_model_len=bears, tensor_parallel=1)
        runner, _, _ = assemble(draft.model, settings, num_blocks=scheduler.pool.num_blocks)
        drafter = ModelDrafter(
            runner, scheduler.pool, max_num_batched_tokens=config.max_num_batched_tokens, max_model_len=bears
        )
    return Speculator(drafter, scheduler, num_draft_tokens=config.num_draft_tokens, num_valid=num_valid)


def _text_config(loaded: LoadedModel) -> Any:
    return loaded.model.config.get_text_config(decoder=True)
