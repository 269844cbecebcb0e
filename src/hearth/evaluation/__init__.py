"""Measuring models: perplexity, bits per byte, and the parity gate."""

from hearth.evaluation.gate import evaluate_model, run_gate
from hearth.evaluation.parity import ParityReport
from hearth.evaluation.scoring import TextScore, score_documents

__all__ = ["ParityReport", "TextScore", "evaluate_model", "run_gate", "score_documents"]
