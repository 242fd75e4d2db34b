"""PEFT's ``adapter_config.json``: a LoRA or AdaLoRA config into it and out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.documents import read_json
from veneer.errors import AdapterFileError, ConfigError, nearest, shown
from veneer.frozen.experts import Stack
from veneer.frozen.text_part import is_composite
from veneer.options import ELSEWHERE
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.select import Chosen, matching_suffix, modules_of, rank_and_scale

CONFIG_NAME = "adapter_config.json"

# PEFT options that change what an adapter computes and that Veneer does not have. Their harmless values, which every
# file carries, are False, None, "none", [] and {}; anything else is refused by name.
_UNSUPPORTED = (
    *("bias", "lora_bias", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config", "velora_config"),
)
# Initialisations that also change the base's weights: such a file is right over the changed base only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Those that leave the base as it is, and null; other strings are initialisations that nobody here knows.
_LEAVES_BASE = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
_NUMBERS = ("r", "lora_alpha", "lora_dropout", "init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1",
            "beta2", "orth_reg_weight")  # fmt: skip
_SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out")

_LEAST = 1e-30  # of an alpha that a file has, and 1 / _LEAST the most

_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
)


def to_peft(
    model: nn.Module, config: LoRA | AdaLoRA, chosen: list[Chosen], rows: list[str], kept: dict[str, list[bool]]
) -> dict[str, Any]:
    """The fields PEFT reads. ``rows``: a module of each that ``new_tokens`` belong to, of tied ones the first; ``kept``
    says of each module of an AdaLoRA adapter which of its first triplets are left, once that is decided."""
    own = _adalora_fields(config, kept) if isinstance(config, AdaLoRA) else _lora_fields(config)
    of_experts = [c.name for c in chosen if isinstance(c.module, Stack)]
    if of_experts:
        own["target_parameters"] = _shortest_parameters(model, of_experts)
    whole, meets = _whole_names(model, config.train_also)
    return own | {
        # PEFT adds the names of heads by the task, as endings that here belong to other modules, too.
        "task_type": None if meets else _task(model),
        **_base(str(getattr(model, "name_or_path", None) or "")),
        "lora_dropout": config.dropout,
        "target_modules": _shortest_targets(model, [c.name for c in chosen if not isinstance(c.module, Stack)]),
        "modules_to_save": whole or None,
        "trainable_token_indices": dict.fromkeys(rows, config.new_tokens) or None,
        "fan_in_fan_out": any(isinstance(module.module, Conv1D) for module in chosen),
        "bias": "none",
        "inference_mode": True,
    }


def _base(name: str) -> dict[str, str | None]:
    """The base's name as PEFT has it: a hub id and its revision apart."""
    repository, at, commit = name.partition("@")
    hub = bool(at) and not Path(name).exists() and not name.startswith(("/", "."))
    return {"base_model_name_or_path": repository if hub else name or None, **({"revision": commit} if hub else {})}


def base_named(fields: dict[str, Any]) -> str | None:
    """The base that a PEFT config names, as `load` takes it."""
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not name:
        return None
    return f"{name}@{revision}" if revision and not Path(str(name)).exists() else str(name)


def _task(model: nn.Module) -> str | None:
    if is_composite(getattr(model, "config", None)) and type(model).__name__.endswith("ForConditionalGeneration"):
        return "CAUSAL_LM"  # of images or sound and text
    task = next((task for ending, task in _TASKS if type(model).__name__.endswith(ending)), None)
    # peft's wrapper for this task hands over text and a decoder's text; Whisper takes sound.
    takes_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    pair = takes_text and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return None if task == "SEQ_2_SEQ_LM" and not pair else task


def _lora_fields(config: LoRA) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": _number(config.alpha if config.alpha is not None else 2.0 * config.rank),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        # LoftQ's, too: the base is unchanged, and peft would itself quantise it if the field said loftq.
        "init_lora_weights": config.init if config.init == "gaussian" else True,
    }


def _adalora_fields(config: AdaLoRA, kept: dict[str, list[bool]]) -> dict[str, Any]:
    assert config.initial_rank is not None
    assert config.total_steps is not None
    first, last = config.phases()
    return {
        "peft_type": "ADALORA",
        "init_r": config.initial_rank,
        "target_r": _number(config.target_rank),
        "lora_alpha": _number(config.alpha if config.alpha is not None else 2.0 * config.initial_rank),
        "total_step": config.total_steps,
        "tinit": first,
        "tfinal": config.total_steps - last,
        "deltaT": config.delta_t,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonality,
        "rank_pattern": {f"{path}.lora_E": flags for path, flags in kept.items()} or None,
    }


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _whole_names(model: nn.Module, endings: list[str]) -> tuple[list[str], bool]:
    """The names of the modules trained whole, for PEFT, and whether one of them is the ending of another module's name.

    Whole names, since PEFT compares plain endings, and "norm" would reach every input_layernorm. DistilBERT's
    "classifier" would also reach its pre_classifier; "model.classifier" is that of PEFT's wrapper alone.
    """
    there = modules_of(model)
    whole = list(dict.fromkeys(name for ending in endings for name in matching_suffix(ending, there)))
    meeting = {name for name in whole if any(other.endswith(name) and other not in whole for other in there)}
    return [f"model.{name}" if name in meeting else name for name in whole], bool(meeting)


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names where these choose exactly the same modules, else the whole names; so for a text
    part, beside which other parts have modules of the same names."""
    if is_composite(getattr(model, "config", None)):
        return names
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    there = modules_of(model)
    reached = {name for ending in endings for name in matching_suffix(ending, there)}
    return endings if reached == set(names) else names


def _shortest_parameters(model: nn.Module, names: list[str]) -> list[str]:
    """The last two parts of the names where these choose exactly the same parameters, else the whole names."""
    endings = sorted({".".join(name.rsplit(".", 2)[-2:]) for name in names})
    stacks = [name for name, module in modules_of(model).items() if isinstance(module, Stack)]
    reached = {name for ending in endings for name in matching_suffix(ending, stacks)}
    return endings if reached == set(names) else names


def from_peft(folder: Path) -> LoRA | AdaLoRA:
    """The LoRA or AdaLoRA config of a PEFT folder.

    Raises AdapterFileError when the file is missing or damaged, or asks for what Veneer does not do.
    """
    path, fields = folder / CONFIG_NAME, read_fields(folder)
    if "peft_type" not in fields and {"fine_tune_type", "lora_parameters"} & set(fields):
        raise AdapterFileError(f"{path} is of mlx-lm, whose adapters cannot be loaded; train it here, or use mlx-lm.")
    if fields.get("peft_type") not in ("LORA", "ADALORA"):
        raise AdapterFileError(
            f"{path} describes a {str(fields.get('peft_type'))[:100]} adapter; only LORA and ADALORA can be loaded."
        )
    for name in _UNSUPPORTED:
        if fields.get(name) not in (None, False, "none", [], {}):
            raise AdapterFileError(f"{path} sets {name} = {shown(fields[name])}, which Veneer does not support.")
    _refuse_types(path, fields)
    for name in ("target_parameters", "use_dora"):
        if fields.get(name) and fields["peft_type"] == "ADALORA":
            raise AdapterFileError(f"{path} sets {name}, which AdaLoRA does not have here.")
    if fields.get("lora_alpha", 8) is None and fields["peft_type"] == "LORA":
        raise AdapterFileError(f"{path} sets lora_alpha = null, so the scale is not known; write the number into it.")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterFileError(
            f"{path} was made with init_lora_weights = {shown(init)}, which changes the base's weights too; convert it "
            f"to a plain LoRA with PEFT first (path_initial_model_for_weight_conversion)."
        )
    if not isinstance(init, bool | None) and not (isinstance(init, str) and init.lower() in _LEAVES_BASE):
        raise AdapterFileError(
            f"{path} has init_lora_weights = {shown(init)}, which is not known here and may change the base's weights; "
            f"known are true, false, {', '.join(_LEAVES_BASE[:-2])}."
        )
    try:
        config = _adalora(path, fields) if fields["peft_type"] == "ADALORA" else _lora(path, fields)
    except (ConfigError, TypeError) as error:
        raise AdapterFileError(f"{path}: {error}") from None
    _refuse_out_of_range(path, config)
    return config


def _refuse_types(path: Path, fields: dict[str, Any]) -> None:
    """Raises AdapterFileError for a number or a switch that is something else: true is no rank, "no" no switch."""
    numbers = {name: fields.get(name) for name in _NUMBERS}
    for name in ("rank_pattern", "alpha_pattern"):
        its = fields.get(name)
        if isinstance(its, dict) and fields["peft_type"] == "LORA":
            numbers |= {f"{name}[{key!r}]": value for key, value in its.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise AdapterFileError(f"{path} has {shown(name)} = {shown(value)}, which is no number.")
    for name in _SWITCHES:
        if not isinstance(fields.get(name), bool | None):
            raise AdapterFileError(f"{path} has {name} = {shown(fields[name])}, which is neither true nor false.")


def _refuse_out_of_range(path: Path, config: LoRA | AdaLoRA) -> None:
    """Raises AdapterFileError for a rank that no file's matrix has, and an alpha that is 0 or infinite in float32."""
    ranks: dict[str, int | None]
    if isinstance(config, LoRA):
        ranks = {"r": config.rank, **config.rank_pattern}
        alphas = {"lora_alpha": config.alpha, **config.alpha_pattern}
    else:
        ranks, alphas = {"init_r": config.initial_rank}, {"lora_alpha": config.alpha}
    for name, rank in ranks.items():
        if rank is not None and rank >= 2**31:
            raise AdapterFileError(f"{path} gives {shown(name)} the rank {shown(rank)}, which no matrix has.")
    for name, alpha in alphas.items():
        if alpha is not None and not _LEAST <= alpha <= 1 / _LEAST:
            raise AdapterFileError(f"{path} gives {shown(name)} the alpha {alpha:g}, which is no scale in float32.")


def _lora(path: Path, fields: dict[str, Any]) -> LoRA:
    return LoRA(
        rank=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        rslora=fields.get("use_rslora") or False,
        dora=fields.get("use_dora") or False,
        target_parameters=fields.get("target_parameters") or [],
        init="gaussian" if fields.get("init_lora_weights", True) == "gaussian" else "kaiming",
        **_shared(path, fields),
    )


def _adalora(path: Path, fields: dict[str, Any]) -> AdaLoRA:
    initial, first, final = fields.get("init_r", 12), fields.get("tinit", 0), fields.get("tfinal", 0)
    return AdaLoRA(
        initial_rank=initial,
        target_rank=min(initial, fields.get("target_r", 8)),
        alpha=fields.get("lora_alpha") or initial,  # PEFT's scale is 1 when alpha is 0
        # Old versions of PEFT wrote no steps; an adapter that is only used needs none.
        total_steps=fields.get("total_step") or first + final + 1,
        tinit=first,
        tfinal=final,
        delta_t=fields.get("deltaT", 1),
        beta1=fields.get("beta1", 0.85),
        beta2=fields.get("beta2", 0.85),
        orthogonality=fields.get("orth_reg_weight", 0.5),
        **_shared(path, fields),
    )


def _shared(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "dropout": fields.get("lora_dropout", 0.0) or 0.0,
        "targets": _targets(fields.get("target_modules")),
        "exclude": fields.get("exclude_modules") or [],
        "layers": _as_list(fields.get("layers_to_transform")),
        "layers_pattern": _lists(path, fields),
        "train_also": fields.get("modules_to_save") or [],
        "new_tokens": _token_ids(path, fields.get("trainable_token_indices")),
    }


def peft_call(config: object) -> str:
    """The call that makes here what an object of peft's config classes describes: veneer.LoRA(rank=8, alpha=8).

    It gives the options that differ from the defaults here.
    """
    kind = AdaLoRA if "ADALORA" in str(getattr(config, "peft_type", "")) else LoRA
    own = {"r"} if kind is AdaLoRA else set()  # AdaLoraConfig has LoRA's r, of which it makes no use
    given = {}
    for name, value in vars(config).items():
        here = [option for option in ELSEWHERE.get(name, (name,)) if option in kind.model_fields]
        if here and name not in own and value not in (None, [], {}, kind.model_fields[here[0]].default):
            given[here[0]] = sorted(value) if isinstance(value, set) else value
    if given.get("init") is True:
        del given["init"]
    return f"veneer.{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def name_and_rank(path: str, rows: int, config: LoRA | AdaLoRA | None) -> tuple[str, int]:
    """What is adapted by the tensors of a file that PEFT calls ``path``, and its rank, where A there has ``rows`` rows.

    A module is called so itself and has that rank; of experts, ``path`` is their module, wrapped once for each of its
    parameters, and A has the rows of all of them.
    """
    if not isinstance(config, LoRA) or not config.target_parameters:
        return path, rows
    plain, depth = path.replace(".base_layer", ""), path.count(".base_layer")
    own = {target.rpartition(".")[::2] for target in config.target_parameters}
    inside = {name for parent, name in own if not parent or matching_suffix(parent, [plain])}
    is_named = any(parent and matching_suffix(parent, [plain]) for parent, _ in own)
    order = sorted(inside, key="down_proj".__eq__)  # the outermost wrapper is the last parameter's
    if depth >= len(order) or not (is_named or rows != rank_and_scale(path, config)[0]):
        return path, rows
    name = f"{plain}.{order[-1 - depth]}"
    return name, rank_and_scale(name, config)[0]


def kept_triplets(folder: Path) -> dict[str, list[bool]]:
    """Module name → which of its first triplets an AdaLoRA folder's tensors are; empty when none is left out."""
    pattern = read_fields(folder).get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(_is_flags(flags) for flags in pattern.values()):
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} has rank_pattern = {shown(pattern)}; AdaLoRA's gives each matrix a list of true "
            f"and false, a triplet each."
        )
    # PEFT writes the adapter's name after lora_E, or leaves it out, by its version.
    return {key.partition(".lora_E")[0]: flags for key, flags in pattern.items()}


def _is_flags(flags: Any) -> bool:
    return isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags)


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of a PEFT folder's config, unchanged. Raises AdapterFileError."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterFileError(_no_config(folder))
    try:
        fields = read_json(path)
    except (ValueError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} does not hold a JSON object.")
    return fields


def _targets(value: str | list[str] | None) -> str | list[str]:
    """``target_modules``; where it is null, PEFT knows them by the model's type, and the tensors name them."""
    return "all-linear" if value is None else value


def _as_list(value: int | list[int] | None) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])


def _lists(path: Path, fields: dict[str, Any]) -> list[str]:
    """``layers_pattern``, which PEFT takes for an expression; none where no layers are chosen, as there."""
    given = fields.get("layers_pattern") or []
    lists = [given] if isinstance(given, str) else given
    if not isinstance(lists, list) or not all(isinstance(name, str) for name in lists):
        raise AdapterFileError(f"{path} has layers_pattern = {shown(given)}, which is no list of names.")
    if not _as_list(fields.get("layers_to_transform")):
        return []
    for name in lists:
        if not name.replace("_", "").replace(".", "").isalnum():
            raise AdapterFileError(
                f"{path} has the expression {shown(name)} in layers_pattern; give the names of lists (layers, blocks)."
            )
    return lists


def _token_ids(path: Path, value: list[int] | dict[str, list[int]] | None) -> list[int]:
    if isinstance(value, dict):
        if len({tuple(ids) for ids in value.values()}) > 1:
            raise AdapterFileError(
                f"{path} trains other tokens of {' than of '.join(value)}; Veneer trains the same ones of each."
            )
        value = next(iter(value.values()), [])
    return list(value or [])


def _no_config(folder: Path) -> str:
    if not folder.exists():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        close = nearest(folder.name, siblings, count=1)
        return f"There is no folder {folder}." + (f" Did you mean {folder.parent / close[0]}?" if close else "")
    inside = sorted(str(p.parent.relative_to(folder)) for p in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f" The folder {folder / inside[0]} has one." if inside else ""
    return f"{folder} is not an adapter folder: it holds no {CONFIG_NAME}.{hint}"
