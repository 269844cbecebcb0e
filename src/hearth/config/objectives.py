"""The sections of a recipe that only some objectives read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from hearth.config.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section


class PreferenceSection(Section):
    """Learning from comparisons: DPO, IPO, KTO, ORPO, SimPO, and reward models."""

    beta: PositiveFloat = Field(
        0.1, description="Strength of the pull towards the reference (DPO, KTO), or scale of the margin."
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="DPO: assumed share of comparisons that are the wrong way round."
    )
    gamma: NonNegativeFloat = Field(0.5, description="SimPO: margin that the scaled difference should reach.")
    odds_weight: NonNegativeFloat = Field(0.1, description="ORPO: weight of the odds-ratio term.")
    sft_weight: NonNegativeFloat = Field(
        0.0, description="Weight of the chosen answer's token loss, added to any of them."
    )
    desirable_weight: NonNegativeFloat = Field(1.0, description="KTO: weight of good answers.")
    undesirable_weight: NonNegativeFloat = Field(1.0, description="KTO: weight of bad answers.")
    center_weight: NonNegativeFloat = Field(
        0.0, description="Reward model: weight of the squared sum of a pair's rewards, which centres them."
    )
    reference: Literal["auto", "precompute", "adapter", "model"] = Field(
        "auto",
        description="Where reference log-probabilities come from: computed once before training, the model "
        "with its adapter off, or a frozen copy. auto: adapter where there is one, else precompute.",
    )


class RewardSection(Section):
    """One source of rewards for reinforcement learning."""

    name: str | None = Field(
        None, description="A registered reward (exact_answer, matches, length …) or `module:function`."
    )
    model: str | None = Field(None, description="A reward model: name, name@version, or a directory.")
    weight: float = Field(1.0, description="Factor of this reward in the sum.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the reward.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.name is None) == (self.model is None):
            raise ValueError("give name or model, one of them")
        return self


class ReinforceSection(Section):
    """GRPO and PPO: rollouts by Hearth's own engine."""

    rewards: tuple[RewardSection, ...] = Field((), description="What makes an answer good; summed.")
    num_generations: PositiveInt = Field(8, description="Answers drawn for each prompt (GRPO's group).")
    max_new_tokens: PositiveInt = Field(128, description="Longest answer, in tokens.")
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature of the rollouts.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="Nucleus of the rollouts.")
    iterations: PositiveInt = Field(1, description="Optimizer steps on each batch of rollouts.")
    clip_low: PositiveFloat = Field(0.2, description="The policy ratio is clipped below 1 minus this.")
    clip_high: PositiveFloat = Field(0.2, description="The policy ratio is clipped above 1 plus this.")
    kl_weight: NonNegativeFloat = Field(0.0, description="Weight of the divergence from the reference.")
    scale_advantages: bool = Field(True, description="GRPO: divide advantages by their group's deviation.")
    loss: Literal["tokens", "sequences"] = Field(
        "tokens", description="Average over all tokens of the step, or over answers of their token means."
    )
    value_weight: NonNegativeFloat = Field(0.5, description="PPO: weight of the value loss.")
    value_clip: PositiveFloat = Field(0.2, description="PPO: largest change of a value in one step.")
    discount: Fraction = Field(1.0, description="PPO: discount of later rewards.")
    gae_lambda: Fraction = Field(0.95, description="PPO: lambda of generalised advantage estimation.")


class DistillSection(Section):
    """Learning from a larger model."""

    teacher: str | None = Field(None, description="A name, name@version, a directory, hf:org/name.")
    mode: Literal["logits", "sequence"] = Field(
        "logits",
        description="logits: match its distribution over every token; sequence: train on answers it writes.",
    )
    temperature: PositiveFloat = Field(1.0, description="Both distributions are softened by it.")
    weight: Fraction = Field(0.5, description="Share of the teacher's term; the rest is the data's own loss.")
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward", description="Kullback-Leibler towards the teacher, from it, or Jensen-Shannon."
    )
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="jsd: share of the teacher in the mixture that both are compared with."
    )
    max_new_tokens: PositiveInt = Field(256, description="sequence: longest answer, in tokens.")
    sampling_temperature: NonNegativeFloat = Field(
        0.0, description="sequence: temperature of the teacher's answers; 0 takes the likeliest token."
    )


class ParameterGroupSection(Section):
    """Weights that are optimised in a way of their own."""

    match: str = Field(description="Glob over the names of weights, such as `*.embed_tokens.*`.")
    learning_rate_scale: NonNegativeFloat = Field(1.0, description="Factor of the learning rate.")
    weight_decay: NonNegativeFloat | None = Field(None, description="Instead of train.weight_decay.")
    freeze: bool = Field(False, description="Do not train these weights.")
