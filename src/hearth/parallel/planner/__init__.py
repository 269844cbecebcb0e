"""Which layout a job needs, how much memory, and how fast it will be: pure arithmetic on a model's shape."""

from hearth.parallel.planner.choose import Choice, Planning, choose
from hearth.parallel.planner.facts import ModelFacts, facts_of_config, facts_of_recipe
from hearth.parallel.planner.hardware import Cluster, make_cluster, parse_bytes
from hearth.parallel.planner.job import Job, job_of_recipe
from hearth.parallel.planner.memory import Memory, Plan, memory_of
from hearth.parallel.planner.refusal import check_fits
from hearth.parallel.planner.step import Step, step_time

__all__ = [
    "Choice",
    "Cluster",
    "Job",
    "Memory",
    "ModelFacts",
    "Plan",
    "Planning",
    "Step",
    "check_fits",
    "choose",
    "facts_of_config",
    "facts_of_recipe",
    "job_of_recipe",
    "make_cluster",
    "memory_of",
    "parse_bytes",
    "step_time",
]
