"""Read llama2.c's binary model and tokenizer formats into a Hugging Face directory.

Formats: karpathy/llama2.c, ``export.py`` (legacy version 0) and ``tokenizer.py``. The model is a Llama whose
rotary embedding turns adjacent pairs (0,1), (2,3), …; transformers turns the halves of a head against each
other, so the rows of wq and wk are reordered.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hearth.errors import ModelError
from hearth.models.saving import save_model

_HEADER = struct.Struct("<7i")
_MAGIC = 0x616B3432  # "ak42": the versioned formats, which hold other things
_NUM_SPECIAL = 3  # <unk>, <s>, </s>
_NUM_BYTES = 256
_SPACE = "▁"


@dataclass(frozen=True)
class Llama2cHeader:
    """The seven numbers at the start of the file."""

    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int
    tied: bool

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.dim // self.num_heads

    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each array, in the order of the file."""
        layers, dim, hidden = self.num_layers, self.dim, self.hidden_dim
        kv_dim = self.num_kv_heads * self.head_dim
        arrays: list[tuple[str, tuple[int, ...]]] = [
            ("embedding", (self.vocab_size, dim)),
            ("attention_norm", (layers, dim)),
            ("wq", (layers, dim, dim)),
            ("wk", (layers, kv_dim, dim)),
            ("wv", (layers, kv_dim, dim)),
            ("wo", (layers, dim, dim)),
            ("ffn_norm", (layers, dim)),
            ("w1", (layers, hidden, dim)),
            ("w2", (layers, dim, hidden)),
            ("w3", (layers, hidden, dim)),
            ("final_norm", (dim,)),
            ("rotary_real", (self.context_length, self.head_dim // 2)),
            ("rotary_imaginary", (self.context_length, self.head_dim // 2)),
        ]
        return arrays if self.tied else [*arrays, ("output", (self.vocab_size, dim))]

    @property
    def file_size(self) -> int:
        """Bytes that a file with this header must have."""
        return _HEADER.size + 4 * sum(int(np.prod(shape)) for _, shape in self.arrays())


def _read_header(path: Path) -> Llama2cHeader:
    try:
        with path.open("rb") as file:
            raw = file.read(_HEADER.size)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) < _HEADER.size:
        raise ModelError(
            f"{path} is no llama2.c model: {len(raw)} bytes, the header alone takes {_HEADER.size}"
        )
    dim, hidden, layers, heads, kv_heads, vocab, context = _HEADER.unpack(raw)
    if dim == _MAGIC:
        raise ModelError(
            f"{path} is of a versioned llama2.c format", fix="export it with version 0 (float32)"
        )
    header = Llama2cHeader(dim, hidden, layers, heads, kv_heads, abs(vocab), context, tied=vocab > 0)
    values = (dim, hidden, layers, heads, kv_heads, abs(vocab), context)
    if min(values) < 1 or max(values) > 1 << 24 or dim % heads or heads % kv_heads or header.head_dim % 2:
        raise ModelError(f"{path} is no llama2.c model: impossible sizes {values} in its header")
    return header


def read_llama2c(path: Path | str) -> LlamaForCausalLM:
    """The model of a llama2.c file. Raises ``ModelError`` when its size does not fit its header."""
    path = Path(path)
    header = _read_header(path)
    actual = path.stat().st_size
    if actual != header.file_size:
        raise ModelError(
            f"{path} does not fit its header: expected {header.file_size} bytes, found {actual}",
            fix="fetch the file again",
        )
    arrays: dict[str, torch.Tensor] = {}
    with path.open("rb") as file:
        file.seek(_HEADER.size)
        for name, shape in header.arrays():
            values = np.fromfile(file, dtype="<f4", count=int(np.prod(shape)))
            arrays[name] = torch.from_numpy(values.astype(np.float32)).reshape(shape)
    config = LlamaConfig(
        vocab_size=header.vocab_size,
        hidden_size=header.dim,
        intermediate_size=header.hidden_dim,
        num_hidden_layers=header.num_layers,
        num_attention_heads=header.num_heads,
        num_key_value_heads=header.num_kv_heads,
        head_dim=header.head_dim,
        max_position_embeddings=header.context_length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=header.tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    _, unexpected = model.load_state_dict(_state_dict(header, arrays), strict=False)
    assert not unexpected, unexpected
    if header.tied:
        model.tie_weights()
    return model.eval()


def _to_halves(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of each head from adjacent pairs to halves: row 2j → j, row 2j+1 → j + D/2."""
    out, inner = weight_OI.shape
    return weight_OI.view(num_heads, out // num_heads // 2, 2, inner).transpose(1, 2).reshape(out, inner)


def _state_dict(header: Llama2cHeader, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {"model.embed_tokens.weight": arrays["embedding"], "model.norm.weight": arrays["final_norm"]}
    state["lm_head.weight"] = arrays["embedding"] if header.tied else arrays["output"]
    for layer in range(header.num_layers):
        prefix = f"model.layers.{layer}."
        state[prefix + "input_layernorm.weight"] = arrays["attention_norm"][layer]
        state[prefix + "post_attention_layernorm.weight"] = arrays["ffn_norm"][layer]
        state[prefix + "self_attn.q_proj.weight"] = _to_halves(arrays["wq"][layer], header.num_heads)
        state[prefix + "self_attn.k_proj.weight"] = _to_halves(arrays["wk"][layer], header.num_kv_heads)
        state[prefix + "self_attn.v_proj.weight"] = arrays["wv"][layer]
        state[prefix + "self_attn.o_proj.weight"] = arrays["wo"][layer]
        state[prefix + "mlp.gate_proj.weight"] = arrays["w1"][layer]
        state[prefix + "mlp.down_proj.weight"] = arrays["w2"][layer]
        state[prefix + "mlp.up_proj.weight"] = arrays["w3"][layer]
    return state


def read_llama2c_vocabulary(path: Path | str, vocab_size: int) -> list[tuple[bytes, float]]:
    """Bytes and score of every token. Raises ``ModelError`` when the file does not hold ``vocab_size``."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    entries: list[tuple[bytes, float]] = []
    position = 4  # the longest token's length comes first
    while position < len(raw):
        if position + 8 > len(raw):
            raise ModelError(f"{path} ends inside token {len(entries)} ({len(raw)} bytes)")
        score, length = struct.unpack_from("<fi", raw, position)
        position += 8
        if length < 0 or position + length > len(raw):
            raise ModelError(
                f"{path} ends inside token {len(entries)}: {length} bytes wanted, {len(raw) - position} left"
            )
        entries.append((raw[position : position + length], score))
        position += length
    if len(entries) != vocab_size:
        raise ModelError(f"{path} holds {len(entries)} tokens, the model has {vocab_size}")
    return entries


def _piece(index: int, raw: bytes) -> str:
    specials = ("<unk>", "<s>", "</s>")
    if index < _NUM_SPECIAL:
        return specials[index]
    if index < _NUM_SPECIAL + _NUM_BYTES:
        return f"<0x{index - _NUM_SPECIAL:02X}>"
    return raw.decode("utf-8").replace(" ", _SPACE)


def convert_vocabulary(entries: list[tuple[bytes, float]]) -> PreTrainedTokenizerFast:
    """A fast tokenizer that merges like llama2.c: always the adjacent pair whose result scores highest.

    Every split of a token into two tokens becomes a merge, ranked by the token's score. As in
    SentencePiece, a literal U+2581 in a text reads as a space.
    """
    pieces = [_piece(index, raw) for index, (raw, _) in enumerate(entries)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    first = _NUM_SPECIAL + _NUM_BYTES
    mergeable = set(pieces[first:])
    ranked: list[tuple[float, int, int, str, str]] = []
    for index in range(first, len(pieces)):
        piece = pieces[index]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-entries[index][1], index, cut, left, right))
    ranked.sort()
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in ranked],
            unk_token="<unk>",  # noqa: S106 - a token of text
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in pieces[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106 - tokens of text
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        clean_up_tokenization_spaces=False,
    )


def import_llama2c(bin_path: Path | str, tokenizer_path: Path | str, out_dir: Path | str) -> None:
    """Convert a llama2.c model and tokenizer to a Hugging Face Llama directory at ``out_dir``.

    Raises ``ModelError`` when a file is damaged or the two do not belong together.
    """
    model = read_llama2c(bin_path)
    tokenizer = convert_vocabulary(read_llama2c_vocabulary(tokenizer_path, model.config.vocab_size))
    # llama2.c separates stories by BOS and stops there.
    generation = GenerationConfig(bos_token_id=1, eos_token_id=[1, 2])
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_model(model, tokenizer, out_dir, generation)
