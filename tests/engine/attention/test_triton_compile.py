"""The Triton kernels compile to machine code for GPUs, without one: Triton brings its assembler.

What the interpreter lets pass, the compiler may refuse: names, types, shapes of matrix products. Compiling
happens in a process of its own, because this one has Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPILE = """
import json, sys, warnings
warnings.simplefilter("ignore")  # about defaults that Triton will change
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hearth.engine.attention import triton_kernels

name, types, constants, capability = json.loads(sys.argv[1])
kernel = getattr(triton_kernels, name)
names = kernel.arg_names
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
constexprs = {(names.index(n),): value for n, value in constants.items()}
source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
print(len(compiled.asm["cubin"]))
"""


def compiled_bytes(
    tmp_path: Path, kernel: str, types: dict[str, str], constants: dict[str, Any], capability: int
) -> int:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    arguments = json.dumps([kernel, types, constants, capability])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


def attend(
    tmp_path: Path,
    dtype: str,
    stored: str,
    capability: int,
    *,
    queries: int = 4,
    splits: int = 8,
    **changes: Any,
) -> int:
    types = {
        "query": f"*{dtype}", "out": f"*{dtype}", "keys": f"*{stored}", "values": f"*{stored}",
        "scale": "fp32", "softcap": "fp32", "tables": "*i32", "tiles": "*i32",
        **dict.fromkeys(["key_scales", "value_scales", "sinks", "partial", "partial_lse"], "*fp32"),
    }  # fmt: skip
    constants = {
        "H": 8, "K": 2, "GP": 4, "QUERIES": queries, "D": 128, "DP": 128, "E": 128, "EP": 128, "S": 32,
        "TILE": 64, "SPLITS": splits, "SCALED": stored != dtype, "SOFTCAP": False, "WINDOW": False,
        "SINKS": False, "PRECISION": "ieee" if dtype == "fp32" else "tf32", "UPCAST": False, **changes,
    }  # fmt: skip
    return compiled_bytes(tmp_path, "attend_kernel", types, constants, capability)


def test_a_decode_in_bfloat16_compiles(tmp_path: Path) -> None:
    assert attend(tmp_path, "bf16", "bf16", 90) > 1000


RULES = {"SOFTCAP": True, "WINDOW": True, "SINKS": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "stored", "capability", "changes"),
    [
        ("bf16", "bf16", 80, {"queries": 16, "splits": 1, **RULES}),
        ("bf16", "fp8e4nv", 90, {}),
        ("bf16", "i8", 80, {"D": 192, "DP": 256, "TILE": 32, "queries": 16, "splits": 1, "WINDOW": True}),
        ("fp16", "fp16", 80, {"D": 64, "DP": 64, "E": 64, "EP": 64, "SINKS": True}),
        ("fp32", "fp32", 90, {"D": 64, "DP": 64, "E": 64, "EP": 64, "queries": 16, "splits": 1}),
    ],
)
def test_every_rule_and_type_compiles(
    dtype: str, stored: str, capability: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert attend(tmp_path, dtype, stored, capability, **changes) > 1000


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "largest"), [("bf16", 0.0), ("fp8e4nv", 448.0), ("i8", 127.0)])
def test_storing_compiles(stored: str, largest: float, tmp_path: Path) -> None:
    types = {"new": "*bf16", "pool": f"*{stored}", "scales": "*fp32", "slots": "*i32"}
    constants = {
        "K": 2, "S": 32, "DIM": 80, "DIMP": 128, "SCALED": stored != "bf16", "LARGEST": largest,
        "ROUNDS": stored == "i8",
    }  # fmt: skip
    assert compiled_bytes(tmp_path, "store_kernel", types, constants, 90) > 1000


@pytest.mark.slow
def test_merging_compiles(tmp_path: Path) -> None:
    types = {"partial": "*fp32", "partial_lse": "*fp32", "sinks": "*fp32", "tiles": "*i32", "out": "*bf16"}
    constants = {"H": 8, "QUERIES": 4, "E": 128, "EP": 128, "SPLITS": 8, "SPLITSP": 8, "SINKS": True}
    assert compiled_bytes(tmp_path, "merge_kernel", types, constants, 90) > 1000
