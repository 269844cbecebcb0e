"""LoRA adapters of PEFT's format: loaded and unloaded while the engine runs, mixed in one batch."""

from hearth.engine.adapters.applying import AdapterSet
from hearth.engine.adapters.reading import Adapter, read_adapter

__all__ = ["Adapter", "AdapterSet", "read_adapter"]
