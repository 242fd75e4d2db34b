"""Models that come with Python code of their own, which Veneer never runs.

transformers asks on the terminal whether to run it, unless it is given ``trust_remote_code=False``: every call that
reads a model gives that. What transformers has a class of its own for is loaded with that class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from veneer.documents import read_json
from veneer.errors import ModelError

_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"


def refuse_own_config(folder: Path, name: str) -> None:
    """Raises ModelError where only code in the folder of the model ``name`` could say what model it is."""
    said = _said(folder / _CONFIG)
    if said.get("auto_map") and said.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{name} needs its own code ({_listed(said['auto_map'])}, as auto_map in its {_CONFIG} says), which Veneer "
            f"does not run; take a model whose model_type transformers has a class for."
        )


def refuse_own_tokenizer(folder: Path, name: str) -> None:
    """Raises ModelError where only code in the folder of the model ``name`` could say how its texts become tokens."""
    said = _said(folder / _TOKENIZER)
    auto_map = said.get("auto_map")
    own = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map  # a list: of older files
    if own and not _is_known(said.get("tokenizer_class")):
        raise ModelError(
            f"The tokenizer of {name} needs its own code ({_listed(own)}, as auto_map in its {_TOKENIZER} says), which "
            f"Veneer does not run; save one of transformers' own beside the model with tokenizer.save_pretrained."
        )


def _said(file: Path) -> dict[str, Any]:
    """Nothing where the file is missing or damaged, which transformers has words for."""
    try:
        said = read_json(file)
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _is_known(class_name: Any) -> bool:
    if not isinstance(class_name, str):
        return False
    return any(tokenizer_class_from_name(known) for known in (class_name, f"{class_name.removesuffix('Fast')}Fast"))


def _listed(classes: Any) -> str:
    """The classes that an auto_map names, which is a mapping, a list or a name."""
    values = classes.values() if isinstance(classes, dict) else [classes]
    flat = [name for value in values for name in (value if isinstance(value, (list, tuple)) else [value]) if name]
    return ", ".join(dict.fromkeys(map(str, flat)))
