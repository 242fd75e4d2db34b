"""Which linear layers "all-linear" leaves out because no update can go on them."""

from __future__ import annotations

from torch import nn

from veneer.frozen.read_outside import read_outside
from veneer.frozen.text_part import beside_text
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.select import LINEAR_TYPES, head_names, is_adaptable, modules_of


def left_out(model: nn.Module, config: LoRA | AdaLoRA) -> str:
    """A sentence that names them, or nothing; the head is left out on purpose."""
    if config.targets != "all-linear":
        return ""
    modules, outside = modules_of(model), read_outside(model)
    heads, beside = head_names(model, modules), tuple(f"{name}." for name in beside_text(model))
    reasons: dict[str, list[str]] = {}
    for name, module in modules.items():
        if not isinstance(module, LINEAR_TYPES) or name in heads or f"{name}.".startswith(beside):
            continue
        if name in outside:
            reasons.setdefault("the module around it reads its weight itself", []).append(name)
        elif not is_adaptable(module):
            reasons.setdefault(f"a {type(module).__name__}, which cannot be adapted", []).append(name)
    clauses = [f"{_some(names)} ({why})" for why, names in reasons.items()]
    return f"all-linear leaves out {'; '.join(clauses)}." if clauses else ""


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
