"""The main job, end to end: `hearth demo`."""

from hearth.demo.plan import DEFAULT_MINUTES
from hearth.demo.report import DemoReport, render
from hearth.demo.run import run_demo

__all__ = ["DEFAULT_MINUTES", "DemoReport", "render", "run_demo"]
