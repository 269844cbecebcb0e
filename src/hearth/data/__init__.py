"""Sources → filters → deduplication → tokens → packed rows. numpy and tokenizers only; no torch.

prepare_dataset   a recipe's sources to a dataset directory
Dataset, TokenSplit a prepared dataset, memory-mapped, with provenance
SampleRows        comparisons, verdicts and prompts, one by one
PackPlan, PackedRows, row_index   isolated packing and the order of the rows
render_chat, audit_chat, DataTokenizer   conversations to ids and loss mask
"""

from hearth.data.chat import AuditReport, audit_chat, render_chat
from hearth.data.dataset import Dataset, TokenSplit, find_dataset
from hearth.data.job import Job, plan_job
from hearth.data.manifest import Manifest
from hearth.data.order import consumed_row_index, row_index
from hearth.data.packing import PackPlan
from hearth.data.prepare import prepare_dataset, prepare_in_folder
from hearth.data.progress import NullProgress, Progress
from hearth.data.rows import IGNORE, PackedRow, PackedRows
from hearth.data.sample_rows import SampleRows
from hearth.data.template import CHATML_TEMPLATE
from hearth.data.tokenizer import SPECIAL_TOKENS, DataTokenizer, train_bpe

__all__ = [
    "CHATML_TEMPLATE",
    "IGNORE",
    "SPECIAL_TOKENS",
    "AuditReport",
    "DataTokenizer",
    "Dataset",
    "Job",
    "Manifest",
    "NullProgress",
    "PackPlan",
    "PackedRow",
    "PackedRows",
    "Progress",
    "SampleRows",
    "TokenSplit",
    "audit_chat",
    "consumed_row_index",
    "find_dataset",
    "plan_job",
    "prepare_dataset",
    "prepare_in_folder",
    "render_chat",
    "row_index",
    "train_bpe",
]
