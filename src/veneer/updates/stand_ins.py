"""Methods of transformers' models that would go wrong on adapted modules, and what does their work while adapters are
attached: other libraries' loops call them.

Each is an object in the model's own ``__dict__``, where Python finds it before the class's method; unlike a bound
method it is pickled and copied with the model as what it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from veneer.arguments import folder_given
from veneer.errors import AdapterFileError, ArgumentError, TargetError, did_you_mean
from veneer.updates.adapter_file import adapter_tensors, write_adapter
from veneer.updates.record import adapted, adapters_of, holders_of, put
from veneer.updates.state import write_resumable

_CHECKPOINT = re.compile(r"checkpoint-\d+")  # transformers.Trainer's folders, which it resumes from

# Keywords of transformers' save_pretrained that change nothing about an adapter at these values.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "safe_serialization": (True,),
    "push_to_hub": (False,),
    "variant": (None,),
    "token": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True, False),
    "distributed_checkpoint": (False,),
}
_WHY = {
    "safe_serialization": "an adapter is written as safetensors only, since a pickle can run code",
    "push_to_hub": "write the folder, then veneer.push(folder, repo)",
    "token": "write the folder, then veneer.push(folder, repo)",
    "variant": "an adapter's files have one name each",
    "save_peft_format": "an adapter is written in PEFT's format",
    "distributed_checkpoint": "an adapter is one file",
}


class StandIn:
    """A method of ``model``, pickled and copied with it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


class SavePretrained(StandIn):
    """``model.save_pretrained`` writes the active adapter, as PEFT's does, and into Trainer's checkpoints also what
    resumes it. Several active ones are written into folders of their own names.

    The keys of an adapted model's weights are of no use to transformers, which would load the rest as if new.
    """

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = "50GB",
        **more: Any,
    ) -> None:
        folder = folder_given("save_pretrained", save_directory, "save_directory")
        _refuse_keywords({"push_to_hub": push_to_hub, **more})
        active = adapters_of(self.model).active
        if not active:
            raise TargetError(
                "No adapter is active, so save_pretrained has nothing to write; activate one, or remove all to save "
                "the model."
            )
        if max_shard_size is not None:
            for name in active:
                _refuse_shards(adapter_tensors(self.model, name), max_shard_size)
        if not is_main_process:
            return
        try:
            for name in active:
                write_adapter(self.model, folder if len(active) == 1 else folder / name, name, state=state_dict)
            if _CHECKPOINT.fullmatch(folder.name):
                write_resumable(self.model, folder, state_dict)
        except OSError as error:
            raise AdapterFileError(f"{folder} cannot be written to: {error.strerror or error}.") from None


def _refuse_keywords(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in _HARMLESS:
            raise ArgumentError(
                f"save_pretrained of a model with adapters takes no {name!r}.{did_you_mean(name, _HARMLESS)} "
                f"veneer.save(model, folder, name=…, dtype=…) has the choices there are."
            )
        if value not in _HARMLESS[name]:
            raise ArgumentError(
                f"save_pretrained of a model with adapters cannot be given {name} = {value!r}: {_WHY[name]}."
            )


def _refuse_shards(tensors: dict[str, Tensor], size: int | str) -> None:
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=size)
    if plan.is_sharded:
        raise ArgumentError(
            f"save_pretrained of a model with adapters cannot be given max_shard_size = {size!r}: the adapter has "
            f"{plan.metadata['total_size']:,} bytes and is written as one file."
        )


class TieWeights(StandIn):
    """``model.tie_weights`` ties what the adapters stand around; their own copies of it stay their own."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        model, wrappers = self.model, adapted(self.model)
        holders = holders_of(model)
        for path, wrapper in wrappers.items():
            put(model, path, wrapper.base, holders)
        holders = holders_of(model)
        try:
            return cast(Any, type(model)).tie_weights(model, *args, **keywords)
        finally:
            for path, wrapper in wrappers.items():
                put(model, path, wrapper, holders)


class ResizeTokenEmbeddings(StandIn):
    """``model.resize_token_embeddings`` is refused, unless the size stays: new rows would be in no adapter."""

    def __call__(self, new_num_tokens: int | None = None, *args: Any, **keywords: Any) -> Any:
        model = self.model
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        size = int(embedding.weight.shape[0])
        multiple = keywords.get("pad_to_multiple_of") or (args[0] if args else None)
        wanted = size if new_num_tokens is None else int(new_num_tokens)
        wanted = wanted if not multiple else -(-wanted // int(multiple)) * int(multiple)
        if wanted != size:
            raise TargetError(
                f"resize_token_embeddings({wanted}) would change the base ({size} tokens) under the adapters "
                f"{', '.join(adapters_of(model).configs)}, which do not hold the new rows; resize before attach, and "
                f"train the new tokens with new_tokens=[…]."
            )
        return embedding


_STAND_INS: dict[str, type[StandIn]] = {
    "save_pretrained": SavePretrained,
    "tie_weights": TieWeights,
    "resize_token_embeddings": ResizeTokenEmbeddings,
}


def stand_in(model: nn.Module) -> None:
    """Put the methods in their places, where the model's class has such."""
    for name, kind in _STAND_INS.items():
        if hasattr(type(model), name):
            model.__dict__[name] = kind(model)


def stand_back(model: nn.Module) -> None:
    """The model's methods are its class's own again."""
    for name in _STAND_INS:
        model.__dict__.pop(name, None)
