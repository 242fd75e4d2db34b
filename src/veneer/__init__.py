"""Veneer: fine-tune open language models with low-rank updates on the machine you have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.commands.evaluate import evaluate as evaluate
    from veneer.commands.load import load as load
    from veneer.commands.plan import plan as plan
    from veneer.commands.predict import predict as predict
    from veneer.commands.push import push as push
    from veneer.commands.train import resume as resume
    from veneer.commands.train import train as train
    from veneer.errors import VeneerError as VeneerError
    from veneer.errors import VeneerWarning as VeneerWarning
    from veneer.frozen.weight import int8_activations as int8_activations
    from veneer.generation.generate import generate as generate
    from veneer.generation.generate import stream as stream
    from veneer.models.from_bitsandbytes import from_bitsandbytes as from_bitsandbytes
    from veneer.updates.adapter_file import save as save
    from veneer.updates.attach import attach as attach
    from veneer.updates.attach import remove as remove
    from veneer.updates.base_file import save_base as save_base
    from veneer.updates.combine import combine as combine
    from veneer.updates.config import AdaLoRA as AdaLoRA
    from veneer.updates.config import LoRA as LoRA
    from veneer.updates.export import export as export
    from veneer.updates.load_adapter import load_adapter as load_adapter
    from veneer.updates.lora_plus import lora_plus as lora_plus
    from veneer.updates.merge import merge as merge
    from veneer.updates.merge import unmerge as unmerge
    from veneer.updates.record import activate as activate
    from veneer.updates.record import allocator as allocator
    from veneer.updates.record import disabled as disabled
    from veneer.updates.trainable import trainable as trainable

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used: `veneer --help` loads no torch.
_HOME = {
    "VeneerError": "veneer.errors",
    "VeneerWarning": "veneer.errors",
    "LoRA": "veneer.updates.config",
    "AdaLoRA": "veneer.updates.config",
    "load": "veneer.commands.load",
    "int8_activations": "veneer.frozen.weight",
    "from_bitsandbytes": "veneer.models.from_bitsandbytes",
    "attach": "veneer.updates.attach",
    "lora_plus": "veneer.updates.lora_plus",
    "combine": "veneer.updates.combine",
    "activate": "veneer.updates.record",
    "allocator": "veneer.updates.record",
    "disabled": "veneer.updates.record",
    "remove": "veneer.updates.attach",
    "trainable": "veneer.updates.trainable",
    "plan": "veneer.commands.plan",
    "train": "veneer.commands.train",
    "resume": "veneer.commands.train",
    "evaluate": "veneer.commands.evaluate",
    "predict": "veneer.commands.predict",
    "generate": "veneer.generation.generate",
    "stream": "veneer.generation.generate",
    "push": "veneer.commands.push",
    "save": "veneer.updates.adapter_file",
    "save_base": "veneer.updates.base_file",
    "load_adapter": "veneer.updates.load_adapter",
    "export": "veneer.updates.export",
    "merge": "veneer.updates.merge",
    "unmerge": "veneer.updates.merge",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    import_module("veneer.unix")  # on Windows one sentence, before another library says that it lacks a module
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__]
