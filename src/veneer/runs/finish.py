"""The end of a run: the result is written to its folder, and handed to the caller."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.device import device_of, peak_memory
from veneer.files import atomic_folder
from veneer.models.library import quiet
from veneer.notebook import html_table
from veneer.runs.begin import Begun
from veneer.runs.facts import Facts, facts_of
from veneer.runs.folder import RunFolder
from veneer.training.own_weights import restore_trained, write_model
from veneer.training.state import State
from veneer.units import amount, duration
from veneer.updates.adapter_file import write_adapter


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run. Losses are means over held-out tokens, in nats; None without held-out rows."""

    folder: Path
    model: Any
    tokenizer: Any
    steps: int
    loss_before: float | None
    loss_after: float | None
    best_step: int
    seconds: float
    peak_memory: int  # bytes
    advice: tuple[str, ...] = ()  # sentences, where the run learned too little
    accuracy: float | None = None  # share of held-out rows right, of what is kept; None where they have no labels
    largest_class: float | None = None  # share of those rows that always answering the most frequent label has right

    @property
    def written(self) -> Path:
        """The adapter; or the model, where its own weights were trained."""
        written = RunFolder(self.folder).result()
        assert written is not None
        return written

    def _facts(self) -> dict[str, str]:
        facts = {"steps": f"{self.steps:,}", "time": duration(self.seconds), "peak memory": amount(self.peak_memory)}
        if self.loss_before is not None and self.loss_after is not None:
            facts = {"held-out loss": f"{self.loss_before:.3f} → {self.loss_after:.3f}", **facts}
        if self.accuracy is not None and self.largest_class is not None:
            facts["held-out accuracy"] = f"{100 * self.accuracy:.1f} % (largest class {100 * self.largest_class:.1f} %)"
        return facts

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}: {', '.join(f'{name} {value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        facts = {**self._facts(), **({"advice": " ".join(self.advice)} if self.advice else {})}
        return html_table(("", str(self.folder)), facts.items(), "A finished run")


def finish(begun: Begun, state: State) -> None:
    """Write adapter/ (or model/): the best one where held-out rows chose one, else the last. The model keeps it."""
    folder, model = begun.folder, begun.model
    chosen = state.best_loss is not None
    if begun.config.trains_own_weights:
        if chosen and state.best_step != state.step:
            restore_trained(model, folder.best)
        with atomic_folder(folder.model) as temporary:
            write_model(model, begun.prepared.tokenizer, temporary)
            _facts(begun, state, own_tokenizer=False).write(temporary)
            _keep_what_was_added(folder.model, temporary)
        return
    old = folder.adapter
    with atomic_folder(old) as temporary:
        if chosen:
            shutil.copytree(folder.best, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("step"))
        else:
            write_adapter(model, temporary)
        _write_facts(begun, state, temporary)
        _keep_what_was_added(old, temporary)
    if chosen and state.best_step != state.step:
        restore_trained(model, folder.best)


def _keep_what_was_added(old: Path, new: Path) -> None:
    """Copy what a person, or the model card, put beside the result before the run went on; weights are none of it."""
    for file in old.glob("*"):
        weights = file.name.startswith("model") and ".safetensors" in file.name  # in other parts now
        if file.is_file() and not weights and not (new / file.name).exists():
            shutil.copy(file, new)


def _write_facts(begun: Begun, state: State, folder: Path) -> None:
    """What makes the folder stand alone: veneer.json, and the tokenizer, where it is not the base's own."""
    prepared = begun.prepared
    own = begun.folder.tokenizer.is_dir()
    if own:
        with quiet():
            prepared.tokenizer.save_pretrained(folder)
    _facts(begun, state, own_tokenizer=own).write(folder)


def _facts(begun: Begun, state: State, *, own_tokenizer: bool) -> Facts:
    records = _evaluations(begun)
    before = records[0]["held_out_loss"] if records else None
    losses = before, state.best_loss
    return facts_of(begun.prepared, state.best_step or state.step, losses, own_tokenizer=own_tokenizer)


def _evaluations(begun: Begun) -> list[dict[str, Any]]:
    return [record for record in begun.folder.metrics() if "held_out_loss" in record]


def result_of(begun: Begun, state: State, advice: tuple[str, ...] = (), largest_class: float | None = None) -> Result:
    """What the caller gets, the model in eval mode."""
    begun.model.eval()
    records = _evaluations(begun)
    before = records[0]["held_out_loss"] if records else None
    kept = [record for record in records if record["step"] == state.best_step] if state.best_step else records
    accuracy = kept[-1].get("held_out_accuracy") if kept else None
    return Result(
        begun.folder.path, begun.model, begun.prepared.tokenizer, state.step, before, state.best_loss, state.best_step,
        state.seconds, peak_memory(device_of(begun.model)), advice, accuracy, largest_class,
    )  # fmt: skip
