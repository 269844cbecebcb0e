"""The workspace: database, artifact store, runs, model registry, lineage and API keys of one project."""

from hearth.workspace.artifacts import ArtifactStore, TreeFile
from hearth.workspace.keys import ApiKey, KeyStore
from hearth.workspace.lineage import Lineage, LineageNode
from hearth.workspace.registry import ModelVersion, Registry
from hearth.workspace.runs import MetricPoint, Run, RunStore
from hearth.workspace.workspace import Workspace

__all__ = [
    "Workspace",
    "ArtifactStore",
    "TreeFile",
    "RunStore",
    "Run",
    "MetricPoint",
    "Registry",
    "ModelVersion",
    "Lineage",
    "LineageNode",
    "KeyStore",
    "ApiKey",
]
