"""What a training run is asked to do: one declaration for Python, YAML and the command line. No torch here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from veneer import documents
from veneer.data.config import RowOptions
from veneer.data.forms import check_template, typed_arguments
from veneer.data.lengths import LongRows
from veneer.data.metrics import check_metric, check_metrics
from veneer.data.sources import named_sources
from veneer.errors import ConfigError, did_you_mean
from veneer.files import write_text
from veneer.frozen.config import BaseOptions, BlockwiseOptions, Storage
from veneer.options import Options, memory_size, without_unit
from veneer.updates.config import AdaLoRA, AllocationOptions, LoRA, UpdateOptions

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


def _template(value: Any) -> Any:
    return check_template(str(value)) if isinstance(value, str | Path) else value


# Option → the objectives that have it.
_OF_OBJECTIVES = {
    "beta": ("dpo", "orpo", "kto"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "label_smoothing": ("likelihood",),
}


class TrainConfig(LoRA, AllocationOptions, BaseOptions, RowOptions):
    """A run: the model, the rows, the update (every option of LoRA and AdaLoRA), and how it is trained."""

    model: str = Field(
        description="Model folder, .gguf file, hub id (also name@revision), or packaged name (smollm2-135m-instruct)."
    )
    data: str = Field(
        description="Rows: .jsonl, .json, .csv, .tsv, .parquet, .txt, a folder of such files, a name of datasets "
        "(name:config:split), or bbc-topics; several with commas, b.jsonl=2 for twice as often."
    )
    output: str = Field(description="Run folder to make: adapter, checkpoints, metrics.")
    adapter: str | None = Field(
        default=None,
        description="Run or adapter folder to start from; model, method and the update's options are those of it.",
    )
    held_out: float | str = Field(
        default="auto",
        description="Rows kept from training to measure on: a share, a number of rows, or a file. 0: none; auto: those "
        "of a folder's validation files or a data set's validation split, else a share of 0.1.",
    )
    method: Literal["lora", "adalora", "full", "bias", "head"] = Field(
        default="lora",
        description="What is trained: an update of one rank for all, or of ranks given out by importance; or the "
        "model's own weights: all, its biases, or its head.",
    )
    storage: Storage = Field(default="fp32", description="How the frozen base is kept.")
    task: Literal["auto", "causal", "seq2seq", "classification", "multi-label", "regression"] = Field(
        default="auto",
        description="What the model is trained to do: to write text, or, with a head, to choose a class, all labels of "
        "a text, or a number. auto asks its checkpoint, and of lists of labels makes multi-label.",
    )
    template: str = Field(
        default="auto",
        description="Chat template for conversations only (auto, plain), or for prompt and completion too (chat); or "
        "another one than the tokenizer's: alpaca, chatml, or a file.",
    )
    template_arguments: dict[str, Any] = Field(
        default={}, description="What the chat template is given: enable_thinking=false."
    )
    fold_turns: bool = Field(
        default=False,
        description="Put the system message into the first user turn and join successive turns of one role, for "
        "templates that take neither (Gemma, Mistral).",
    )
    learn: Literal["answer", "last", "all"] = Field(
        default="answer",
        description="Tokens that are learned: of every answer, of a conversation's last answer, or all.",
    )
    system: str | None = Field(
        default=None, description="System message of conversations that have none, in training and in use."
    )
    objective: Literal["auto", "likelihood", "dpo", "orpo", "kto"] = Field(
        default="auto",
        description="What is made better: the likelihood of answers; chosen answers against rejected ones (dpo, orpo); "
        "or good answers against bad ones (kto). auto: dpo or kto for rows with such answers, else likelihood.",
    )
    beta: Positive = Field(
        default=0.1,
        description="How strongly dpo and kto are held to the model as it was; in orpo the weight of the odds ratio, "
        "the paper's λ.",
    )
    desirable_weight: Positive = Field(default=1.0, description="Weight of good answers in kto.")
    undesirable_weight: Positive = Field(default=1.0, description="Weight of bad answers in kto.")
    max_length: int = Field(default=1024, ge=2, description="Most tokens of a row; see long_rows.")
    long_rows: LongRows = Field(
        default="auto",
        description="Longer rows: cut (at the end), cut-front, drop, or split, plain text into pieces; auto: plain "
        "text is split, others are cut.",
    )

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps. Default: as many as the epochs take.")
    epochs: Positive | Literal["auto"] = Field(
        default="auto",
        description="Times through the rows, when steps is not given; auto: once, and more often through few rows.",
    )
    batch_size: int = Field(default=16, ge=1, description="Rows in an optimizer step.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Rows in one pass, to save memory; does not change the result. Default: batch_size.",
    )
    learning_rate: Positive | Literal["auto"] = Field(
        default="auto", description="Highest learning rate of AdamW; auto: by the method and the model's width."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="Learning rate after warm-up."
    )
    warmup: float = Field(default=0.03, ge=0, description="Steps of warm-up: a share of all below 1, else a number.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW.")
    lora_plus: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="LoRA+: how many times the learning rate B has, and A has it once; the paper has 16 with a lower "
        "learning rate. 1: both the same.",
    )
    optimizer: Literal["adamw", "paged-adamw"] = Field(
        default="adamw", description="AdamW, or the same with its states in a file of which a part is in memory."
    )
    optimizer_memory: str = Field(
        default="256MB", description="States of paged-adamw in memory at a time; does not change the result."
    )
    optimizer_bits: Literal[32, 8] = Field(
        default=32,
        description="Bits of each state of paged-adamw; 8 takes a quarter of the room and changes the result a bit.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target that is spread over the vocabulary, or the classes."
    )
    class_weights: Literal["none", "balanced"] | dict[str, Positive] = Field(
        default="none",
        description="Weight of each class in a classifier's loss, spam=4,ham=1 (others 1); balanced: rows / (classes × "
        "rows of the class), as in scikit-learn. With several labels a row, of each label in the rows that have it; "
        "balanced: rows without / rows with it, as torch advises for pos_weight.",
    )
    neftune: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="NEFTune: noise on the embeddings while training, of ± this / √(tokens of the row × width); the "
        "paper has 5 to 15. 0: none.",
    )
    clip: float = Field(default=1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third slower."
    )
    memory: str | None = Field(
        default=None,
        description="Memory that the run may take (24GB): as few layers are recomputed as fit it. Default: what the "
        "machine has available.",
    )
    check_memory: bool = Field(
        default=True, description="Refuse a run that clearly cannot fit the memory, before it starts."
    )
    evaluate_every: Count | Literal["auto"] = Field(
        default="auto",
        description="Steps between held-out evaluations; 0: at the end only; auto: 50, or an epoch of few rows, or "
        "more where many rows are held out.",
    )
    metrics: list[str] = Field(
        default=[],
        description="Also measured of answers to held-out rows, at most 64: exact, rouge-1, rouge-2, rouge-l, bleu, or "
        "functions of your own, package.module:function.",
    )
    best_by: str = Field(
        default="loss",
        description="What decides which adapter is kept, and patience: the held-out loss, accuracy (of labels), or a "
        "metric.",
    )
    patience: Count | Literal["auto"] = Field(
        default="auto",
        description="Stop after this many evaluations in a row that are not better, in held-out loss or what best_by "
        "says; 0: never; auto: 2 where auto chose several epochs, else never.",
    )
    checkpoint_every: int = Field(default=100, ge=1, description="Steps between checkpoints, from which a run resumes.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Latest checkpoints that are kept.")
    log_to: list[Literal["mlflow", "wandb"]] = Field(
        default=[], description="Also log to these: mlflow, wandb; each an extra to install (veneer[wandb])."
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of the split, the order of rows, the initial values and dropout."
    )

    _several = field_validator("data", mode="before")(named_sources)

    @field_validator("model", "output", "held_out", "adapter", mode="before")
    @classmethod
    def _path_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    _template_known = field_validator("template", mode="before")(_template)
    _arguments_typed = field_validator("template_arguments", mode="before")(typed_arguments)

    @field_validator("class_weights", mode="before")
    @classmethod
    def _classes_are_text(cls, value: Any) -> Any:
        return {str(name): weight for name, weight in value.items()} if isinstance(value, dict) else value

    _metrics_known = field_validator("metrics")(check_metrics)

    @field_validator("best_by")
    @classmethod
    def _measured(cls, value: str) -> str:
        return value if value in ("loss", "accuracy") else check_metric(value)

    @field_validator("held_out")
    @classmethod
    def _number_or_file(cls, value: float | str) -> float | str:
        try:
            number = float(value)  # the command line gives every value as text
        except ValueError:
            return value
        if not 0 <= number < math.inf or (number >= 1 and number % 1):
            raise ValueError(f"held_out = {value} is not a share from 0 up to 1, a whole number of rows, or a file.")
        return number

    @field_validator("optimizer_memory", "memory", mode="before")
    @classmethod
    def _size_in_memory(cls, value: Any, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        try:
            size = memory_size(value)
            if isinstance(value, int) and size < 1e6:
                raise ConfigError(without_unit(value))
        except ConfigError as error:
            raise ValueError(f"{info.field_name} = {error}") from None
        return f"{value}B" if isinstance(value, int) else str(value)

    @model_validator(mode="after")
    def _memory_of_pages(self) -> TrainConfig:
        if self.optimizer == "adamw" and self.optimizer_memory != type(self).model_fields["optimizer_memory"].default:
            raise ValueError("optimizer_memory limits the states of paged-adamw; give optimizer: paged-adamw as well.")
        if self.optimizer == "adamw" and self.optimizer_bits != 32:
            raise ValueError("adamw has its states in 32 bits; give optimizer: paged-adamw as well as optimizer_bits.")
        return self

    @model_validator(mode="after")
    def _options_of_one_method(self) -> TrainConfig:
        groups: dict[str, type[Options]] = {"lora": LoRA, "adalora": AllocationOptions}
        own = {method: set(group.model_fields) - set(UpdateOptions.model_fields) for method, group in groups.items()}
        own["lora"].add("lora_plus")
        if self.trains_own_weights:
            own["lora"] |= UpdateOptions.model_fields.keys()
        changed = self.changed()
        for method, names in own.items():
            given = [name for name in changed if name in names]
            if given and method != self.method:
                has = ", ".join(sorted(own.get(self.method, ()))) or "none of its own"
                raise ValueError(
                    f"{', '.join(given)} {'is an option' if len(given) == 1 else 'are options'} of method: {method}, "
                    f"and the method is {self.method}, which has {has}."
                )
        if self.trains_own_weights:
            self.refuse_storage()
        if self.method == "adalora":
            self.refuse_rising_ranks()
        return self

    @model_validator(mode="after")
    def _options_of_one_objective(self) -> TrainConfig:
        if self.objective != "auto":
            self.refuse_other_objectives(self.objective)
        return self

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> TrainConfig:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} is more than batch_size = {self.batch_size}: a step is "
                f"made of whole passes or parts, not of more rows."
            )
        return self

    def refuse_storage(self) -> None:
        """Raises ValueError where the model's own weights are trained and not kept, and computed, in fp32."""
        if self.compute == "bf16":
            raise ValueError(
                f"method: {self.method} trains the model's own weights, which is done in fp32; leave out compute: "
                f"bf16, or use method: lora."
            )
        if self.storage != "fp32":
            raise ValueError(
                f"method: {self.method} trains the model's own weights, which are kept in fp32 then; leave out "
                f"storage: {self.storage}, or use method: lora over it."
            )

    def refuse_other_objectives(self, objective: str) -> None:
        """Raises ValueError for an option that was given and that this ``objective`` has not."""
        changed = self.changed()
        for name, objectives in _OF_OBJECTIVES.items():
            if name in changed and objective not in objectives:
                raise ValueError(
                    f"{name} is an option of objective: {' or '.join(objectives)}, and the objective is {objective}; "
                    f"leave it out."
                )
        if objective != "likelihood" and self.learn == "all":
            raise ValueError(f"learn: all would compare the prompts, too; objective: {objective} compares answers.")

    @property
    def trains_own_weights(self) -> bool:
        """Whether it is no update that is trained; the result then is a model."""
        return self.method in ("full", "bias", "head")

    def kept(self) -> dict[str, Any]:
        """How the base is kept, as `veneer.load` takes it."""
        own = {} if self.dense_storage == "fp32" else {"dense_storage": self.dense_storage}
        return {name: getattr(self, name) for name in ("storage", *BlockwiseOptions.model_fields)} | own

    def update(self, total_steps: int) -> LoRA | AdaLoRA:
        """The update's own options; AdaLoRA lays its schedule out over the run's steps."""
        if self.method == "adalora":
            names = AdaLoRA.model_fields.keys() - {"total_steps"}
            return AdaLoRA(total_steps=total_steps, **{name: getattr(self, name) for name in names})
        return LoRA(**{name: getattr(self, name) for name in LoRA.model_fields})

    def changed(self) -> dict[str, Any]:
        """Option → value, where it is not the default."""
        return self.model_dump(exclude_defaults=True)

    def write(self, file: Path) -> None:
        """Every option into a YAML file, which `read` and the command line take back."""
        write_text(file, yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True))

    @classmethod
    def read(cls, path: Path, **over: Any) -> TrainConfig:
        """The run that a YAML file describes; ``over`` wins over the file. Raises ConfigError."""
        return cls(**{**read_options(path), **over})


def read_options(path: Path) -> dict[str, Any]:
    """Option → value of a YAML file. Raises ConfigError when it is no mapping of options."""
    try:
        values = documents.read_yaml(path)
    except FileNotFoundError:
        siblings = [str(p) for pattern in ("*.yaml", "*.yml") for p in path.parent.glob(pattern)]
        raise ConfigError(f"There is no file {path}.{did_you_mean(str(path), siblings)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold options as 'name: value' lines.")
    return {str(name): value for name, value in values.items()}


class RunConfig(TrainConfig):
    """The options of a run that has begun: numbers where ``auto`` was asked for, and each class's weight."""

    objective: Literal["likelihood", "dpo", "orpo", "kto"]
    epochs: Positive
    learning_rate: Positive
    evaluate_every: Count
    patience: Count
    class_weights: dict[str, Positive]  # class → weight, in the order of their ids; empty: all alike
    compute: Literal["fp32", "bf16"]

    @classmethod
    def of(cls, config: TrainConfig, chosen: dict[str, Any]) -> RunConfig:
        """``config``, which is valid, with the numbers chosen for its ``auto`` options; others are not looked at."""
        values = {name: getattr(config, name) for name in TrainConfig.model_fields}
        numbers = {name: number for name, number in chosen.items() if values[name] == "auto"}
        return cls.model_construct(**{**values, **numbers, "class_weights": chosen.get("class_weights", {})})
