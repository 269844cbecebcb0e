"""The recipe: one typed, frozen description of a job, and the hash that names it.

Every section is a frozen pydantic model that refuses unknown keys. Cross-field checks live here, in the
spelling of the file, so that an impossible combination is refused before any work starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from hearth.config.objectives import (
    DistillSection,
    ParameterGroupSection,
    PreferenceSection,
    ReinforceSection,
)
from hearth.config.parallel import ParallelSection
from hearth.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    section,
)
from hearth.config.sweep import SweepSection

_NOT_FOR_FIM = ("sft", "dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "ppo")


class AdapterSection(Section):
    """LoRA, through PEFT."""

    rank: PositiveInt = Field(16, description="Rank of the update matrices.")
    alpha: PositiveFloat = Field(32.0, description="Scale; the update is multiplied by alpha / rank.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the linear layers that get an adapter."
    )
    dora: bool = Field(False, description="Learn magnitudes apart from directions (DoRA).")
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="Keep the frozen base weights in 8 bits or in 4-bit NormalFloat (QLoRA)."
    )


class ModelSection(Section):
    """Where the weights start: an existing model, a size, or a transformers configuration."""

    base: str | None = Field(
        None, description="Model to start from: name, name@version, a directory, hf:org/name."
    )
    size: str | None = Field(None, description="Number of parameters to derive a shape for, such as 10M.")
    config: dict[str, Any] | None = Field(
        None, description="A transformers configuration with model_type, to build from scratch."
    )
    architecture: str = Field("qwen3", description="The model_type that `size` derives a shape for.")
    context_length: PositiveInt = Field(
        1024, description="Longest sequence of a model built from `size`, in tokens."
    )
    adapter: AdapterSection | None = Field(None, description="Train a LoRA adapter instead of all weights.")

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        given = [key for key in ("base", "size", "config") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of base, size and config, not {' and '.join(given)}")
        if self.adapter is not None and self.base is None:
            raise ValueError("adapter needs base: an adapter is trained on top of an existing model")
        return self


class TokenizerSection(Section):
    """Which tokenizer: an existing one, or a byte-level BPE trained on the corpus."""

    base: str | None = Field(
        None, description="Tokenizer to use: a model reference or a directory. Default: that of model.base."
    )
    vocab_size: Annotated[int, Field(ge=260)] = Field(
        8192, description="Size of the byte-level BPE that is trained when there is no base."
    )
    sample_mb: PositiveFloat = Field(64.0, description="At most this much text is read to train it, in MB.")


class SourceSection(Section):
    """One source of documents."""

    path: str = Field(
        description="A file, a folder, a glob, or `stdlib` for the source of Python's standard library."
    )
    format: Literal[
        "auto", "text", "jsonl", "chat", "preference", "feedback", "prompts", "stdlib", "stdlib-chat"
    ] = Field(
        "auto",
        description="text: a file is a document; jsonl: a line is one; chat: a line is a conversation; "
        "preference: a prompt with a better and a worse answer; feedback: an answer with a verdict; "
        "prompts: questions to answer, with whatever else the line holds.",
    )
    text_field: str = Field("text", description="The JSONL key that holds the text.")
    messages_field: str = Field("messages", description="The JSONL key that holds a list of messages.")
    prompt_field: str | None = Field(
        None,
        description="The key of the user's turn, or a pattern of keys in braces, where rows are no messages. "
        "Default for preference, feedback and prompts: prompt.",
    )
    response_field: str | None = Field(
        None, description="The key of the assistant's turn. Default for feedback: completion."
    )
    chosen_field: str = Field("chosen", description="For preference: the key of the better answer.")
    rejected_field: str = Field("rejected", description="For preference: the key of the worse answer.")
    label_field: str = Field("label", description="For feedback: the key that says whether it is good.")
    license: str | None = Field(None, description="The licence of the text, kept in the manifest.")


class FilterSection(Section):
    """Basic quality filters on text documents; what each one removes is counted in the manifest."""

    min_chars: NonNegativeInt = Field(1, description="Drop documents with fewer characters.")
    max_chars: PositiveInt | None = Field(None, description="Drop documents with more characters.")
    max_line_chars: PositiveInt | None = Field(
        None, description="Drop documents whose longest line is longer (minified or generated text)."
    )
    min_alphabetic: Fraction = Field(0.0, description="Drop documents with a smaller share of letters.")
    max_duplicate_lines: Fraction = Field(
        1.0, description="Drop documents where a larger share of the non-empty lines repeats an earlier one."
    )


class FimSection(Section):
    """Fill in the middle, for code models: some texts are read as beginning, end, middle."""

    rate: Fraction = Field(0.5, description="Share of the texts that are rearranged.")
    spm_rate: Fraction = Field(
        0.5, description="Share of those that give the end first and then beginning and middle in one piece."
    )


class DataSection(Section):
    """From sources to packed rows of tokens."""

    dataset: str | None = Field(
        None, description="A prepared dataset, a directory or a name in the workspace; instead of sources."
    )
    sources: tuple[SourceSection, ...] = Field((), description="Where the documents come from.")
    filters: FilterSection = section(FilterSection, "Quality filters.")
    deduplicate: Literal["exact", "none"] = Field("exact", description="Drop repeated documents.")
    on_bad_file: Literal["skip", "fail"] = Field(
        "skip", description="A binary file or invalid UTF-8 among texts: skip it and count it, or stop."
    )
    validation_fraction: Fraction = Field(0.02, description="Share of documents held out for evaluation.")
    sequence_length: PositiveInt = Field(512, description="Tokens in one training row.")
    packing: bool = Field(True, description="Fill rows with several documents, isolated from one another.")
    truncate: bool = Field(
        False,
        description="What is longer than a row is cut instead of dropped and counted: conversations at their "
        "end, prompts of samples at their beginning.",
    )
    fim: FimSection | None = Field(None, description="Train texts to be filled in, too (pretrain).")
    seed: int = Field(0, description="Decides the split and the order of the rows.")
    num_workers: NonNegativeInt = Field(0, description="Processes that tokenise; 0 means one a core.")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.dataset is not None and self.sources:
            raise ValueError("give dataset or sources, not both")
        return self


class TrainSection(Section):
    """Objective and optimisation. A step is one optimizer update over ``batch_size`` rows."""

    objective: str = Field(
        "pretrain",
        description="pretrain, sft, distill, dpo, ipo, kto, orpo, simpo, reward, grpo, ppo, or one that a "
        "package registers as an entry point of hearth.objectives.",
    )
    preference: PreferenceSection = section(PreferenceSection, "Learning from comparisons.")
    reinforce: ReinforceSection = section(ReinforceSection, "Reinforcement learning.")
    distill: DistillSection = section(DistillSection, "Distillation.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps to run.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the data; instead of steps.")
    batch_size: PositiveInt = Field(32, description="Rows in one optimizer step.")
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        8, description="Rows in one forward and backward pass; auto: as many as fit in memory."
    )
    optimizer: Literal["adamw", "adafactor", "lion", "muon", "adamw8bit"] = Field(
        "adamw", description="How gradients become updates."
    )
    parameter_groups: tuple[ParameterGroupSection, ...] = Field(
        (), description="Weights with a learning rate or decay of their own; the first match counts."
    )
    learning_rate: PositiveFloat = Field(3e-4, description="Peak learning rate.")
    min_lr_ratio: Fraction = Field(0.1, description="Final learning rate as a share of the peak.")
    schedule: Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"] = Field(
        "cosine", description="Shape after warmup."
    )
    decay_shape: Literal["linear", "sqrt", "cosine"] = Field(
        "linear", description="WSD: how the learning rate falls in the final decay."
    )
    warmup_steps: NonNegativeInt = Field(0, description="Steps of linear warmup.")
    decay_fraction: Fraction = Field(0.2, description="WSD: share of the steps spent in the final decay.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Decoupled weight decay on matrices.")
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.9, description="beta1 of AdamW, 8-bit AdamW, Muon and Lion."
    )
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.95, description="beta2 of the same.")
    epsilon: PositiveFloat = Field(1e-8, description="epsilon of AdamW, 8-bit AdamW and Muon.")
    grad_clip: NonNegativeFloat = Field(1.0, description="Largest gradient norm; 0 does not clip.")
    precision: Literal["auto", "bf16", "fp16", "fp8", "fp32"] = Field(
        "auto", description="Autocast type; auto takes bf16 where the hardware computes in it."
    )
    compile: bool = Field(False, description="Compile each block of the model with torch.compile.")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="Recompute activations in the backward pass: selective all but products and attention, "
        "full whole blocks.",
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Keep an exponential moving average of the weights with this decay; 0 keeps none."
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite ends the run, or skips the update."
    )
    max_skipped_steps: PositiveInt = Field(10, description="Updates that may be skipped in a row.")
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="First and last step of a torch profile, written into the run as a trace."
    )
    evaluate_every: NonNegativeInt = Field(
        0, description="Steps between evaluations; 0 evaluates at the end."
    )
    evaluate_rows: NonNegativeInt = Field(0, description="Rows of an evaluation; 0 means all.")
    early_stopping_patience: NonNegativeInt = Field(
        0, description="Stop after this many evaluations without improvement; 0 never stops early."
    )
    early_stopping_min_delta: NonNegativeFloat = Field(0.0, description="Smallest improvement that counts.")
    log_every: PositiveInt = Field(1, description="Steps between recorded metrics.")
    seed: int = Field(0, description="Seed of initialisation, dropout and data order.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than steps {self.steps}")
        if self.early_stopping_patience and not self.evaluate_every:
            raise ValueError("early_stopping_patience needs evaluate_every")
        return self


class CheckpointSection(Section):
    """What is saved during training."""

    every: NonNegativeInt = Field(0, description="Steps between checkpoints; 0 saves at the end only.")
    keep: Annotated[int, Field(ge=2)] = Field(2, description="Newest checkpoints to keep, besides the best.")
    async_: bool = Field(
        True, alias="async", description="Write in the background; a step waits only for a copy of the state."
    )
    best_metric: str = Field("eval_loss", description="The metric that decides which checkpoint is best.")
    best_mode: Literal["min", "max"] = Field("min", description="Whether less or more of it is better.")

    model_config = ConfigDict(populate_by_name=True)


class TrackSection(Section):
    """Where metrics go. The workspace always records them."""

    name: str | None = Field(None, description="Name of the run; default: the name of the recipe file.")
    tags: dict[str, str] = Field(default_factory=dict, description="Tags of the run.")
    trackers: tuple[str, ...] = Field(
        (), description="Where metrics go besides the workspace: tensorboard, mlflow, wandb, comet."
    )
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Options of each tracker.")
    system_metrics_every: NonNegativeFloat = Field(
        15.0, description="Seconds between samples of CPU, memory and GPU; 0 takes none."
    )


class EvaluateSection(Section):
    """What `hearth train` measures when the run has ended."""

    bits_per_byte: bool = Field(True, description="Bits per byte on the held-out documents.")
    parity: bool = Field(True, description="Run the parity gate on the registered version.")
    parity_prompts: PositiveInt = Field(8, description="Prompts of the parity gate.")
    parity_tokens: int = Field(32, ge=8, description="Greedy tokens compared for each prompt; at least 8.")


class RegisterSection(Section):
    """The model version that the job leaves behind."""

    name: str | None = Field(None, description="Name in the registry; without it nothing is registered.")
    aliases: tuple[str, ...] = Field(
        (), description="Aliases that `hearth train` sets once the parity gate has passed."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="Tags of the version.")

    @model_validator(mode="after")
    def _named(self) -> Self:
        for key in ("aliases", "tags"):
            if getattr(self, key) and self.name is None:
                raise ValueError(f"{key} needs name: without one nothing is registered")
        return self


class Recipe(Section):
    """A whole job. ``Recipe.load`` reads it from a file with its layers; see ``hearth.config.loading``."""

    model: ModelSection = section(ModelSection, "Where the weights start.")
    tokenizer: TokenizerSection = section(TokenizerSection, "The tokenizer.")
    data: DataSection = section(DataSection, "The data.")
    train: TrainSection = section(TrainSection, "Objective and optimisation.")
    parallel: ParallelSection = section(ParallelSection, "Processes and devices.")
    checkpoint: CheckpointSection = section(CheckpointSection, "Checkpoints.")
    track: TrackSection = section(TrackSection, "Tracking.")
    evaluate: EvaluateSection = section(EvaluateSection, "Evaluation.")
    register_: RegisterSection = section(RegisterSection, "Registration.", alias="register")
    sweep: SweepSection | None = Field(
        default=None, description="Keys of this recipe that `hearth train --sweep` varies."
    )

    model_config = ConfigDict(populate_by_name=True)

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
        """Read a recipe file with all its layers; see ``hearth.config.loading.load_recipe``."""
        from hearth.config.loading import load_recipe

        return load_recipe(path, overrides).recipe

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (
            self.model.base is None
            and self.model.config is None
            and self.data.sequence_length > self.model.context_length
        ):
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is longer than model.context_length "
                f"{self.model.context_length}"
            )
        if self.data.fim is not None and self.train.objective in _NOT_FOR_FIM:
            raise ValueError(
                f"data.fim rearranges plain texts; train.objective {self.train.objective} does not read them"
            )
        if self.register_.aliases and not self.evaluate.parity:
            raise ValueError(
                "register.aliases needs evaluate.parity: aliases are set once the gate has passed"
            )
        return self
