"""The base of every group of options: unknown names are refused, and each refusal is a sentence with the nearest name.

An option is declared once, as a pydantic field with a description; Python, YAML and the command line all read it
from there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from veneer.errors import ArgumentError, ConfigError, did_you_mean, shown

# What peft, transformers, trl and mlx-lm call an option → what it is called here. Where there are several names, the
# message gives those that the refusing class has.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("r", "lora_r", "lora_rank"), ("rank", "initial_rank")),
    **dict.fromkeys(("init_r", "initial_r"), ("initial_rank",)),
    "target_r": ("target_rank",),
    **dict.fromkeys(("lora_alpha", "lora_scale"), ("alpha",)),
    "lora_dropout": ("dropout",),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target"), ("targets",)),
    "exclude_modules": ("exclude",),
    **dict.fromkeys(("layers_to_transform", "lora_layers", "num_layers"), ("layers",)),
    **dict.fromkeys(("modules_to_save", "additional_target"), ("train_also",)),
    "trainable_token_indices": ("new_tokens",),
    "use_rslora": ("rslora",),
    "use_dora": ("dora",),
    "init_lora_weights": ("init",),
    "deltaT": ("delta_t",),
    "orth_reg_weight": ("orthogonality",),
    "total_step": ("total_steps",),
    **dict.fromkeys(("model_name_or_path", "model_id", "base_model"), ("model",)),
    **dict.fromkeys(("train_dataset", "dataset", "dataset_name", "train_file"), ("data",)),
    **dict.fromkeys(("eval_dataset", "val_size", "validation_file", "test_size"), ("held_out",)),
    **dict.fromkeys(("output_dir", "adapter_path", "save_path"), ("output",)),
    **dict.fromkeys(("peft_type", "fine_tune_type", "finetuning_type"), ("method",)),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "dtype"), ("storage",)),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "block_length"), ("max_length",)),
    **dict.fromkeys(("max_steps", "iters", "num_steps"), ("steps",)),
    "num_train_epochs": ("epochs",),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch"), ("micro_batch_size", "batch_size")),
    "global_batch_size": ("batch_size",),
    "lr": ("learning_rate",),
    **dict.fromkeys(("lr_scheduler_type", "lr_schedule", "lr_scheduler"), ("schedule",)),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "num_warmup_steps"), ("warmup",)),
    "optim": ("optimizer",),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_ratio"), ("lora_plus",)),
    **dict.fromkeys(("neftune_noise_alpha", "noise_alpha"), ("neftune",)),
    **dict.fromkeys(("max_grad_norm", "grad_clip"), ("clip",)),
    "label_smoothing_factor": ("label_smoothing",),
    **dict.fromkeys(("problem_type", "task_type", "num_labels"), ("task",)),
    **dict.fromkeys(("class_weight", "loss_weights"), ("class_weights",)),
    **dict.fromkeys(("grad_checkpoint", "use_gradient_checkpointing"), ("gradient_checkpointing",)),
    **dict.fromkeys(("eval_steps", "steps_per_eval"), ("evaluate_every",)),
    **dict.fromkeys(("save_steps", "save_every", "steps_per_save"), ("checkpoint_every",)),
    "save_total_limit": ("keep_checkpoints",),
    "early_stopping_patience": ("patience",),
    "metric_for_best_model": ("best_by",),
    "compute_metrics": ("metrics",),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "mask_prompt", "train_on_inputs"), ("learn",)),
    **dict.fromkeys(("chat_template", "chat_template_path"), ("template",)),
    "chat_template_kwargs": ("template_arguments",),
    **dict.fromkeys(("dataset_text_field", "text_column", "column_mapping", "dataset_columns"), ("columns",)),
    **dict.fromkeys(("system_prompt", "default_system"), ("system",)),
    **dict.fromkeys(("truncation_mode", "truncation_side", "truncation"), ("long_rows",)),
    "mask_history": ("learn",),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), ("max_new_tokens",)),
    "temp": ("temperature",),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_words"), ("stop",)),
    **dict.fromkeys(("repeat_penalty", "rep_pen"), ("repetition_penalty",)),
    **dict.fromkeys(("random_state", "random_seed"), ("seed",)),
    "bnb_4bit_use_double_quant": ("double_quantisation",),
    **dict.fromkeys(("bnb_4bit_quant_type", "quant_type"), ("storage",)),
}
# What is not one option here but follows from others: the options that it follows from, and the sentence.
EXPLAINED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accumulation_steps", "accumulate_grad_batches"),
        ("micro_batch_size", "follows from batch_size (rows of an optimizer step) and micro_batch_size (rows of one "
         "pass): it is their ratio"),
    ),
    **dict.fromkeys(
        ("bf16", "fp16"), ("storage", "is said by storage, which is how the frozen base is kept; the update is trained "
         "in fp32"),
    ),
    "do_sample": ("temperature", "follows from temperature: above 0 tokens are sampled"),
}  # fmt: skip


class Options(BaseModel):
    """Immutable, typed options; ``ConfigError`` instead of pydantic's report when a value is refused.

    One item where a list is meant is a list of one, and a text of several, with commas between them, a list of these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, *unnamed: Any, **values: Any) -> None:
        if unnamed:
            kind = type(self)
            first = next(iter(kind.__annotations__), "name")
            raise ArgumentError(
                f"{kind.__name__} takes its options by name, and {shown(unnamed[0])} has none: write "
                f"{kind.__name__}({first}={shown(unnamed[0])}), if {first} is meant."
            )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _one_item_is_a_list(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: _as_list(value) if name in _lists(cls) else value for name, value in values.items()}


def _lists(options: type[Options]) -> set[str]:
    """The options that are lists and nothing else."""
    return {name for name, field in options.model_fields.items() if get_origin(field.annotation) is list}


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    return list(value) if isinstance(value, range) else value


def _explain(error: ValidationError, options: type[Options]) -> str:
    """All that is wrong with the given options, one clause each."""
    problems = error.errors()
    needed = [str(problem["loc"][-1]) for problem in problems if problem["type"] == "missing"]
    clauses = [f"Needed and not given: {', '.join(needed)}."] if needed else []
    unknown = [str(problem["loc"][-1]) for problem in problems if problem["type"] == "extra_forbidden"]
    clauses += unknown_options(unknown, options)
    invalid: dict[tuple[str, str], list[str]] = {}  # option and value → why not, for each type that it may have
    for problem in problems:
        if problem["type"] == "value_error":
            clauses.append(f"{problem['msg'].removeprefix('Value error, ')}")
        elif problem["type"] not in ("missing", "extra_forbidden"):
            name = ".".join(str(part) for part in problem["loc"] if not _is_type(part)) or options.__name__
            invalid.setdefault((name, shown(problem["input"])), []).append(problem["msg"])
    for (name, value), reasons in invalid.items():
        why = ", or ".join([reasons[0], *(reason.removeprefix("Input should be ") for reason in reasons[1:])])
        clauses.append(f"{options.__name__}: {name} = {value} is not valid: {why}.")
    return " ".join(clauses)


def _is_type(part: int | str) -> bool:
    """Whether a part of pydantic's place of a problem is one of the types that an option may have."""
    return str(part) in ("float", "int", "str", "bool") or str(part).startswith(("literal[", "list[", "constrained-"))


def unknown_options(names: list[str], options: type[Options]) -> list[str]:
    """What to say of names that are no options: what each is called here, or the nearest name, or all there are."""
    clauses = []
    renamed = {name: here for name in names if (here := named_here(name, options.model_fields))}
    if renamed:
        said = [f"{name} {here}" for name, here in renamed.items()]
        clauses.append(f"{options.__name__} has other names for these: {', '.join(said)}.")
    for name in names:
        if name not in renamed:
            near = did_you_mean(name, options.model_fields)
            known = "" if near else f" It has: {', '.join(options.model_fields)}."
            clauses.append(f"{options.__name__} has no option {shown(name)}.{near or known}")
    return clauses


def named_here(name: str, known: Iterable[str]) -> str | None:
    """What an option of another library is called here: "is rank", naming those of the ``known`` names that fit.

    None when no other library is known to call it so, or when none of ``known`` is meant.
    """
    known = set(known)
    own, explanation = EXPLAINED.get(name, ("", ""))
    if own in known:
        return explanation
    here = [option for option in ELSEWHERE.get(name, ()) if option in known]
    return f"is {' or '.join(here)}" if here and name not in known else None


Function = TypeVar("Function", bound=Callable[..., Any])


def shows(options: type[Options], names: Iterable[str]) -> Callable[[Function], Function]:
    """A decorator for a function that takes these options by name: help() and inspect.signature list each of them, with
    its type, default and description, in place of ``**options``."""
    fields = {name: options.model_fields[name] for name in names}

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=field.annotation,
                default=inspect.Parameter.empty if field.is_required() else field.get_default(),
            )
            for name, field in fields.items()
        ]  # fmt: skip
        about = "\n".join(f"    {name}: {field.description}" for name, field in fields.items())
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{about}\n"
        function.__signature__ = signature.replace(parameters=[*own, *taken])  # type: ignore[attr-defined]
        return function

    return decorate


_ADDRESSES = 2**63  # bytes, more than there can be
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def memory_size(value: int | str) -> int:
    """Bytes of "256MB", "1.5GiB" or "3B"; a whole number that is not a text is bytes already.

    Raises ConfigError for a text without a unit, and for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _ADDRESSES:
        return value
    size = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", str(value))
    if size is not None and not size[2]:
        raise ConfigError(without_unit(size[1]))
    if size is None or size[2].upper() not in _UNITS:
        raise ConfigError(
            f"{shown(value)} is not a size in memory; write a number and KB, MB, GB, KiB, MiB or GiB: 256MB."
        )
    bytes_ = round(float(size[1]) * _UNITS[size[2].upper()])
    if bytes_ >= _ADDRESSES:
        raise ConfigError(f"{shown(value)} is more memory than a machine can have.")
    return bytes_


def without_unit(number: int | str) -> str:
    """The refusal of a size that is a number alone. A small one hardly means bytes; a large one may."""
    units = ("GB", "MB", "GiB") if float(number) < 1e6 else ("B",)
    *others, last = [f"{number}{unit}" for unit in units]
    before = ", ".join(others) + " or " if others else ""
    return f"{number} has no unit; write {before}{last}."
