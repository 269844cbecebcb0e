"""The section of a recipe that says how a job is spread over processes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from hearth.config.section import PositiveFloat, PositiveInt, Section


class ParallelSection(Section):
    """Processes and devices: the product of data, shard, tensor, pipeline and context is their number."""

    data: PositiveInt | Literal["auto"] = Field(
        "auto", description="Replicas of the model; auto: as many as the processes that there are allow."
    )
    shard: PositiveInt = Field(1, description="Processes that share the state of one replica (ZeRO, FSDP).")
    zero: Literal[1, 2, 3] = Field(
        3,
        description="What is shared with shard > 1: optimizer state (1), gradients too (2), weights too (3).",
    )
    tensor: PositiveInt = Field(1, description="Processes that share every matrix product.")
    sequence: bool = Field(False, description="With tensor: norms and dropout are split by position, too.")
    pipeline: PositiveInt = Field(1, description="Groups of processes, each with some of the layers.")
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="Order of forward and backward passes in a pipeline."
    )
    stages: PositiveInt = Field(
        1, description="Pieces of the model in each pipeline process; interleaved and zero_bubble take 2."
    )
    context: PositiveInt = Field(1, description="Processes that share the positions of every sequence.")
    expert: PositiveInt = Field(
        1, description="Processes that share the experts of a layer; taken from those of data and shard."
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where sharded weights and optimizer state rest: memory of the host, or a disk."
    )
    offload_dir: str | None = Field(None, description="Folder for offload: nvme.")
    reduce: Literal["fp32", "bf16", "powersgd"] = Field(
        "fp32", description="Type of gradients on the wire between replicas; powersgd sends low-rank factors."
    )
    engine: Literal["native", "deepspeed"] = Field("native", description="Who shards: torch, or DeepSpeed.")
    timeout: PositiveFloat = Field(
        600.0, description="Seconds that a process waits for the others before the run is given up."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schedule == "1f1b" and self.stages != 1:
            raise ValueError(f"stages {self.stages} needs schedule: interleaved or zero_bubble, not 1f1b")
        if self.pipeline == 1 and (self.stages != 1 or self.schedule != "1f1b"):
            raise ValueError("schedule and stages need pipeline > 1")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence needs tensor > 1")
        if self.offload == "nvme" and (self.engine != "deepspeed" or self.offload_dir is None):
            raise ValueError("offload: nvme needs engine: deepspeed and offload_dir")
        return self
