"""Idle threads give way, unless the user said otherwise; a command sets it before torch is loaded."""

from __future__ import annotations

import subprocess
import sys

from hearth.threads import SPIN_COUNT, limit_spinning


def test_the_user_decides() -> None:
    chosen = {"GOMP_SPINCOUNT": "7"}
    limit_spinning(chosen)
    assert chosen == {"GOMP_SPINCOUNT": "7"}
    policy = {"OMP_WAIT_POLICY": "active"}
    limit_spinning(policy)
    assert policy == {"OMP_WAIT_POLICY": "active"}
    empty: dict[str, str] = {}
    limit_spinning(empty)
    assert empty == {"GOMP_SPINCOUNT": SPIN_COUNT}


def test_set_before_torch_is_loaded() -> None:
    code = (
        "import os, sys\nfrom hearth.cli.main import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n"
        "    print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-2:] == [SPIN_COUNT, "False"]
