"""The options that a run has from the adapter that it starts from, and those of the user that contradict it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from veneer.errors import ConfigError, ModelError, shown
from veneer.models.checkpoint import Checkpoint
from veneer.models.origin import hub_id
from veneer.runs.adapter import task_by_peft
from veneer.runs.start import StartAdapter
from veneer.training.config import TrainConfig
from veneer.updates.config import AdaLoRA, AllocationOptions, LoRA, UpdateOptions

_ANY = {"dropout"}  # of an update's options: it is of the training alone
_BEGINNING = ("init", "loftq_iterations")  # of a new adapter: what they were is of no use any more
_Options = TypeVar("_Options", bound=TrainConfig)


def with_start_options(values: dict[str, Any], kind: Callable[..., _Options]) -> dict[str, Any]:
    """The options ``values`` of a run, with those that the adapter named by ``adapter`` decides: the base, the method
    and all of the update; and, where the user gives no others, how prompts are rendered and how the base is kept.

    Raises ConfigError for an option that contradicts the adapter or is invalid for ``kind``, and what reading the
    adapter raises.
    """
    if values.get("adapter") in (None, ""):
        return values
    start = StartAdapter.read(str(values["adapter"]))
    method = values.get("method", start.method)
    if method != start.method:
        raise ConfigError(_contradiction(start, {"method": method}, {"method": start.method}))
    model = _base(start, values.get("model"))
    asked = kind(**{**values, "adapter": start.called, "model": model, "method": method})
    fixed, free = _fixed(start), _free(start)
    given = {name: getattr(asked, name) for name in asked.model_fields_set}
    wrong = [name for name, known in fixed.items() if name in given and not _is_one_of(given[name], known)]
    if wrong:
        theirs = {name: fixed[name][0] for name in wrong}
        raise ConfigError(_contradiction(start, {name: given[name] for name in wrong}, theirs))
    own = {name: known[0] for name, known in fixed.items()}
    own |= {name: LoRA.model_fields[name].default for name in _BEGINNING if name in own}
    own |= {name: value for name, value in free.items() if name not in given}
    return {**values, **own, "adapter": start.called, "model": model, "method": method}


def _contradiction(start: StartAdapter, given: dict[str, Any], theirs: dict[str, Any]) -> str:
    said, has = (_listed(values) for values in (given, theirs))
    one = len(given) == 1
    return (
        f"{said} {'contradicts' if one else 'contradict'} the adapter {start.called}, which has {has}; leave "
        f"{'it' if one else 'them'} out, or train a new adapter, without adapter: {start.called}."
    )


def _listed(values: dict[str, Any]) -> str:
    said = [f"{name} = {shown(value)}" for name, value in values.items()]
    return " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))


def _base(start: StartAdapter, model: Any) -> str:
    """The base to load: the adapter's; or the ``model`` that is given, where that may be the same.

    Raises ConfigError where both are here and are two; AdapterFileError where none is given, and none known.
    """
    if model is None:
        return start.base_here()
    asked, known = str(model), start.base()
    if known is None or _known(known) == _known(asked):
        return asked
    try:
        theirs = Checkpoint(known)
    except ModelError:  # it is not on this machine: kind and sizes are compared when the model is loaded
        return asked
    if Checkpoint(asked).name != theirs.name:
        raise ConfigError(
            f"model = {asked} is not the base of the adapter {start.called}, which is {known}; leave model out to have "
            f"that one, or train a new adapter over {asked}, without adapter: {start.called}."
        )
    return asked


def _known(name: str) -> str:
    """What a model is called everywhere, where that is known."""
    return name if "@" in name else hub_id(name) or name


def _fixed(start: StartAdapter) -> dict[str, list[Any]]:
    """Option → its values that say what the adapter is: as its own run was asked, and as PEFT's config says."""
    group = AllocationOptions if isinstance(start.update, AdaLoRA) else LoRA
    names = [name for name in (*UpdateOptions.model_fields, *group.model_fields) if name not in _ANY]
    written = {name: getattr(start.update, name) for name in names}
    asked = {} if start.facts is None else _as_asked(start.facts.options, names)
    if asked.get("init") == "pissa":  # which may be written with twice the rank
        for name in ("rank", "alpha", "rank_pattern", "alpha_pattern"):
            del asked[name]
    values = {name: [*([asked[name]] if name in asked else []), written[name]] for name in dict.fromkeys(names)}
    rank = start.update.initial_rank if isinstance(start.update, AdaLoRA) else start.update.rank
    if start.update.alpha == 2.0 * (rank or 0):
        values["alpha"].append(None)  # which says the same
    for name in _BEGINNING:
        if name in values:
            values[name].append(LoRA.model_fields[name].default)
    if isinstance(start.update, AdaLoRA) and values["budget"][0] is not None:
        values["target_rank"] = values["target_rank"][:1]  # which follows from it
    return values


def _as_asked(options: dict[str, Any], names: list[str]) -> dict[str, Any]:
    fields = TrainConfig.model_fields
    return {name: options.get(name, fields[name].get_default()) for name in names}


def _free(start: StartAdapter) -> dict[str, Any]:
    """Option → its value, where the user gives no other."""
    if start.facts is None:
        return {"dropout": start.update.dropout, "task": task_by_peft(start.folder).get("task", "auto")}
    facts = start.facts
    prompts = {name: getattr(facts.prompts, name) for name in ("template", "learn", "max_length")}
    return {"dropout": start.update.dropout, "task": facts.task, **prompts, **facts.kept}


def _is_one_of(value: Any, known: list[Any]) -> bool:
    def plain(one: Any) -> Any:
        return sorted(map(str, one)) if isinstance(one, list) else one

    return any(plain(value) == plain(one) for one in known)
