"""Training a model's own weights: all of them, its biases, or its head. Nothing is wrapped.

A run's checkpoints and best/ hold what is trained, and at its end model/ is a transformers folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.errors import TargetError
from veneer.files import atomic_file
from veneer.frozen.new_parts import new_parts
from veneer.frozen.text_part import end_of, say_tied
from veneer.frozen.weight import QuantisedLinear
from veneer.models.composite import copy_processor
from veneer.models.library import quiet
from veneer.updates.adapter_file import (
    active_tensors,
    copy_tensors,
    read_checked,
    restore,
    write_adapter,
    write_tensors,
)
from veneer.updates.record import adapters_of
from veneer.updates.select import classification_head, modules_of, output_head

WEIGHTS_NAME = "trained.safetensors"


def train_own_weights(model: nn.Module, method: str) -> None:
    """Let the parameters that ``method`` (full, bias, head) trains, and no others, require gradients.

    What starts random, a classification head and what else is in no checkpoint, is trained by each. A head that is tied
    to the input embedding is parted from it, so that the embedding stays as it was.

    Raises TargetError for a model with adapters on it or layers in codes, and where there is nothing of the kind.
    """
    if adapters_of(model).configs:
        raise TargetError(f"method: {method} trains the model's own weights; remove its adapters first, or merge them.")
    coded = next((name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)), None)
    if coded is not None:
        raise TargetError(
            f"method: {method} trains the model's own weights, and {coded} is kept in codes, which cannot be trained; "
            f"load the model in fp32, or use method: lora."
        )
    chosen = {id(parameter) for parameter in _chosen(model, method)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _chosen(model: nn.Module, method: str) -> list[nn.Parameter]:
    if method == "full":
        return list(model.parameters())
    classifier = classification_head(model)
    head = output_head(model) if classifier is None else model.get_submodule(classifier)
    beside = [p for part in new_parts(model, modules_of(model))[0] for p in model.get_submodule(part).parameters()]
    if method == "head":
        if head is None:
            raise TargetError(f"method: head has nothing to train: a {type(model).__name__} has no output head.")
        _part_from_embedding(model, head)
        return [*head.parameters(), *beside]
    new = [*beside, *([] if classifier is None or head is None else head.parameters())]
    biases = [parameter for name, parameter in model.named_parameters() if name.split(".")[-1] == "bias"]
    if {id(parameter) for parameter in biases} <= {id(parameter) for parameter in new}:
        raise TargetError(
            f"method: bias has nothing to train: the layers of this {type(model).__name__} have no biases. Use method: "
            f"lora, or head."
        )
    return biases + new


def _part_from_embedding(model: Any, head: nn.Module) -> None:
    embedding = end_of(model, "input")
    weight: Any = getattr(head, "weight", None)
    tied = weight is not None and weight is getattr(embedding, "weight", None)
    if tied:
        head.weight = nn.Parameter(weight.detach().clone())
        say_tied(model.config, False)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a run trains, by name: the active adapter's tensors, or the model's own parameters."""
    if adapters_of(model).configs:
        return active_tensors(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_trained(model: nn.Module, folder: Path) -> None:
    """`trained_tensors` into ``folder``: an adapter as PEFT's files, own weights as one. Raises OSError."""
    if adapters_of(model).configs:
        write_adapter(model, folder)
        return
    with atomic_file(folder / WEIGHTS_NAME) as path:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(trained_tensors(model).items())}
        write_tensors(tensors, path)


def restore_trained(model: nn.Module, folder: Path) -> None:
    """Copy what `write_trained` wrote back. Raises AdapterFileError where it is not this model's."""
    if adapters_of(model).configs:
        restore(model, folder)
        return
    own = trained_tensors(model)
    copy_tensors(read_checked(folder, WEIGHTS_NAME, own), own)


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The whole model into ``folder``, which exists, as transformers keeps it, tokenizer included."""
    with quiet():
        model.save_pretrained(folder)
        copy_processor(model, folder)
        tokenizer.save_pretrained(folder)
