"""How good the demo's models are, on documents that training has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.evaluation.baselines import order0_bits_per_byte, xz_bits_per_byte
from hearth.evaluation.scoring import score_documents
from hearth.models import load_model, model_info
from hearth.training import choose_device

if TYPE_CHECKING:
    from hearth.data import TokenSplit

# How the stdlib source names the document of a module's docstrings.
DOCS_SUFFIX = ":docs"


def score_text(directory: Path, split: TokenSplit, max_bytes: int) -> dict[str, Any]:
    """Bits per byte of the model and of the baselines on the same held-out bytes.

    Takes source files in order until ``max_bytes`` are reached, at least one. The documents of docstrings
    are left out: they repeat what the sources hold, which only a compressor over all of them could use.
    """
    texts: list[str] = []
    documents = []
    size = 0
    for index in range(split.num_documents):
        if size >= max_bytes:
            break
        if str(split.document_info(index)["id"]).endswith(DOCS_SUFFIX):
            continue
        text = split.text(index)
        texts.append(text)
        documents.append((split.tokens(index), None))
        size += len(text.encode())
    data = "".join(texts).encode()
    score = score_documents(
        load_model(directory, device=choose_device()),
        documents,
        num_bytes=len(data),
        context_length=model_info(directory).context_length,
    )
    return {
        "num_documents": len(documents),
        "num_bytes": len(data),
        "model_bits_per_byte": score.bits_per_byte,
        "model_perplexity": score.perplexity,
        "xz_bits_per_byte": xz_bits_per_byte(data),
        "order0_bits_per_byte": order0_bits_per_byte(data),
    }


def score_chat(directory: Path, split: TokenSplit, max_documents: int = 400) -> float:
    """Mean loss of the tokens of held-out answers, in nats."""
    indices = range(min(split.num_documents, max_documents))
    documents = [(split.tokens(index), split.loss_mask(index)) for index in indices]
    score = score_documents(
        load_model(directory, device=choose_device()),
        documents,
        context_length=model_info(directory).context_length,
    )
    return score.loss
