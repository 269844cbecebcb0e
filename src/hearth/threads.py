"""How long OpenMP's idle threads spin before they sleep; it must be said before torch is loaded.

By default GNU OpenMP spins for milliseconds. On cores of its own that costs nothing; on cores that somebody
else uses too, a thread that spins keeps the one it waits for off the core. See decision 0023 for figures.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# Long enough for the gaps between the operators of a training step, short enough to give way to others.
SPIN_COUNT = "10000"


def limit_spinning(environ: MutableMapping[str, str]) -> None:
    """Set the spin count in ``environ`` unless the user has chosen how OpenMP threads wait."""
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
