"""What veneer plan is asked: a run's options, of which those that it does not need may be missing. No torch here."""

from __future__ import annotations

from pydantic import Field, model_validator

from veneer.device import is_host
from veneer.training.config import TrainConfig


class PlanOptions(TrainConfig):
    """veneer plan MODEL [RUN.yaml]"""

    data: str = Field(
        default="", description="Rows, as train takes them. Default: each row is assumed to have max_length tokens."
    )
    output: str = Field(default="", description="Run folder; not made by a plan.")
    measure: bool = Field(default=False, description="Measure this machine's rates again.")

    @model_validator(mode="after")
    def _rates_of_the_cpu(self) -> PlanOptions:
        if self.measure and not is_host(self.device):
            raise ValueError(
                f"measure takes the CPU's rates, and a plan for {self.device} is of memory only: leave one out."
            )
        return self

    def refuse_storage(self) -> None:
        """None: what a run trains in fp32 others train in 16 bits, and a plan may be compared with that."""


# The flags: what decides the memory or the time of a run.
ASKED = (
    *(
        "data",
        "columns",
        "shape",
        "bad_rows",
        "adapter",
        "held_out",
        "template",
        "template_arguments",
        "fold_turns",
        "learn",
        "long_rows",
        "system",
        "epochs",
        "seed",
        "measure",
    ),
    *("method", "storage", "memory", "device", "rank", "initial_rank", "target_rank", "budget", "targets", "exclude"),
    *(
        "layers",
        "layers_pattern",
        "rank_pattern",
        "target_parameters",
        "train_also",
        "new_tokens",
        "block_size",
        "double_quantisation",
        "task",
    ),
    *("dense_storage", "compute", "batch_size"),
    *("micro_batch_size", "max_length", "gradient_checkpointing", "optimizer", "optimizer_memory", "optimizer_bits"),
    *("label_smoothing", "dropout", "dora", "init", "neftune", "steps", "objective"),
)
