"""Weights that files hold in pieces: what is read, and what is written, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hearth.config.recipe import ModelSection
from hearth.errors import UnsupportedModelError
from hearth.models.building import build_model
from hearth.models.in_parts import build_in_parts
from hearth.models.loading import load_model, read_safetensors_header
from hearth.models.pieces import Box, Joined, Piece, are_written_one_by_one, as_in_files, pieces_of
from hearth.models.saving import saved_tensors, write_weights

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 12,  # two digits: 10 comes after 9
    "num_local_experts": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# With the number of weights that files have in pieces.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen2_moe": (4, {"shared_expert_intermediate_size": 20}),
    "qwen3_moe": (4, {}),
    "mixtral": (4, {}),
    "phimoe": (4, {}),
    "olmoe": (4, {}),
    "deepseek_v2": (4, {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "deepseek_v3": (2, {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}),  # a buffer in the files
    "glm4_moe": (2, {}),
    "ernie4_5_moe": (2, {}),
    "minimax": (4, {}),
    "qwen3_next": (4, {}),
    "nemotron_h": (2, {}),
    "olmo_hybrid": (1, {}),
    "gpt_oss": (0, {}),  # has them as the model has
    "phi3": (0, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model with files of a few tensors each."""
    _, settings = FAMILIES[request.param]
    section = ModelSection(config={**SMALL, **settings, "model_type": request.param})
    model = build_model(section, vocab_size=64, seed=1)
    for name, buffer in model.named_buffers():
        if name in model.state_dict() and buffer.is_floating_point():
            buffer.uniform_()  # not what the family would fill it with
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, max_shard_size="30KB")
    return request.param, directory


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_what_is_read_is_what_transformers_loads(family: tuple[str, Path]) -> None:
    name, directory = family
    parts = build_in_parts(ModelSection(base=str(directory)), vocab_size=64)
    assert parts is not None
    expected = tensors_of(load_model(directory, dtype="float32"))
    found = {each: tensor[...] for each, tensor in parts.source.tensors(expected)}
    assert found.keys() == expected.keys()
    for each, tensor in expected.items():
        assert torch.equal(found[each], tensor), each
    joined = [piece for piece in parts.source.pieces.values() if isinstance(piece, Joined)]  # type: ignore[attr-defined]
    assert len(joined) == FAMILIES[name][0]


def test_a_part_is_that_of_the_whole(family: tuple[str, Path]) -> None:
    _, directory = family
    parts = build_in_parts(ModelSection(base=str(directory)), vocab_size=64)
    assert parts is not None
    expected = tensors_of(load_model(directory, dtype="float32"))
    for each, tensor in parts.source.tensors(dict(parts.model.named_parameters())):
        box = tuple(slice(size // 3, size - size // 4) for size in expected[each].shape)
        assert torch.equal(tensor[box], expected[each][box]), each


def test_what_is_written_is_what_transformers_writes(family: tuple[str, Path], tmp_path: Path) -> None:
    _, directory = family
    model = load_model(directory, dtype="float32")
    parts = build_in_parts(ModelSection(base=str(directory)), vocab_size=64)
    assert parts is not None
    empty = parts.model
    assert are_written_one_by_one(empty)
    weights = {name: tensor.detach() for name, tensor in saved_tensors(model)}
    like, limit = dict(saved_tensors(empty)), 20_000
    write_weights(
        weights, like, tmp_path, in_files=lambda name, w: as_in_files(empty, name, w), max_bytes=limit
    )
    for file in tmp_path.glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    written = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    expected = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    model.config.save_pretrained(tmp_path)
    again = tensors_of(load_model(tmp_path, dtype="float32"))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize("model_type", ["hrm_text", "inkling2_text"])
def test_a_rule_that_does_more_than_join_is_left_to_transformers(tmp_path: Path, model_type: str) -> None:
    model = build_model(ModelSection(config={**SMALL, "model_type": model_type}), vocab_size=64, seed=1)
    model.save_pretrained(tmp_path)
    assert not are_written_one_by_one(model)
    with pytest.raises(UnsupportedModelError, match="a rule that is not known here"):
        pieces_of(model, read_safetensors_header(tmp_path / "model.safetensors"))
    assert build_in_parts(ModelSection(base=str(tmp_path)), vocab_size=64) is None


@pytest.fixture
def experts(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """A model and its one file."""
    model = build_model(ModelSection(config={**SMALL, "model_type": "qwen3_moe"}), vocab_size=64, seed=1)
    model.save_pretrained(tmp_path)
    return model, tmp_path / "model.safetensors"


def test_pieces_that_do_not_fit_together_are_not_joined(experts: tuple[PreTrainedModel, Path]) -> None:
    model, file = experts
    headers = read_safetensors_header(file)
    assert pieces_of(model, headers).keys() == model.state_dict().keys()
    headers["model.layers.1.mlp.experts.3.up_proj.weight"]["shape"][1] += 1
    with pytest.raises(UnsupportedModelError, match=r"the pieces of model\.layers\.1\.mlp\.experts\."):
        pieces_of(model, headers)
    headers["model.layers.1.mlp.experts.3.up_proj.weight"]["shape"][1] -= 1
    headers["model.layers.1.mlp.experts.3.up_proj.weight"]["dtype"] = "BF16"
    with pytest.raises(UnsupportedModelError, match=r"the pieces of model\.layers\.1\.mlp\.experts\."):
        pieces_of(model, headers)


def parts_of(file: Path) -> dict[str, Tensor] | None:
    parts = build_in_parts(ModelSection(base=str(file.parent)), vocab_size=64)
    if parts is None:
        return None
    return {name: tensor[...] for name, tensor in parts.source.tensors(dict(parts.model.named_parameters()))}


def test_weights_in_float8_are_left_to_who_knows_their_scales(experts: tuple[PreTrainedModel, Path]) -> None:
    _, file = experts
    small = {
        name: tensor.to(torch.float8_e4m3fn) if "proj" in name else tensor
        for name, tensor in load_file(file).items()
    }
    small |= {f"{name}_scale_inv": torch.ones(1, 1) for name in small if "proj" in name}
    save_file(small, file, {"format": "pt"})
    assert parts_of(file) is None  # though nothing but the type tells


def test_what_is_said_to_be_quantised_is_left_to_transformers(experts: tuple[PreTrainedModel, Path]) -> None:
    _, file = experts
    assert parts_of(file) is not None
    config = json.loads((file.parent / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (file.parent / "config.json").write_text(json.dumps(config))
    assert parts_of(file) is None


def test_what_the_model_has_no_place_for_is_left_out(experts: tuple[PreTrainedModel, Path]) -> None:
    """Layers that predict further tokens, say; and files that are written as the model is."""
    model, file = experts
    more = {f"model.layers.2.mlp.experts.{n}.up_proj.weight": torch.ones(16, 32) for n in range(12)}
    for tensors in (load_file(file) | more, model.state_dict()):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
        found = parts_of(file)
        assert found is not None
        for name, weight in model.named_parameters():
            assert torch.equal(found[name], weight), name


@given(st.data())
def test_any_box_of_any_tree(data: st.DataObject) -> None:
    tensors: dict[str, Tensor] = {}
    read_from: set[str] = set()

    def grown(depth: int, shape: tuple[int, ...]) -> tuple[Piece | Joined, Tensor]:
        if depth == 0:
            name = f"t{len(tensors)}"
            tensors[name] = torch.arange(len(tensors) * 1000, len(tensors) * 1000 + 24).float().reshape(shape)
            return Piece(name, shape, torch.float32), tensors[name]
        found = [grown(depth - 1, shape) for _ in range(numbers[depth])]
        pieces, wholes = zip(*found, strict=True)
        dim, new = dims[depth], news[depth]
        whole = torch.stack(wholes, dim) if new else torch.cat(wholes, dim)
        return Joined(pieces, dim, new), whole

    def read(name: str, box: Box) -> Tensor:
        read_from.add(name)
        return tensors[name][box]

    depth = data.draw(st.integers(0, 2))
    numbers = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    dims = data.draw(st.lists(st.integers(0, 1), min_size=3, max_size=3))
    news = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    piece, whole = grown(depth, (4, 6))
    assert piece.shape == tuple(whole.shape)
    assert set(piece.names()) == tensors.keys()
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape]
    box = tuple(slice(start, stop) for start, stop in ends)
    part = torch.full_like(whole[box], torch.nan)
    piece.read(box, read, part)
    assert torch.equal(part, whole[box])
    if part.numel():  # and nothing is read that has no part in it
        assert read_from == {
            name for name, tensor in tensors.items() if torch.isin(tensor, part.contiguous()).any()
        }
