"""The model card, README.md, of an adapter's folder, of a model whose own weights a run trained, or of a merged model:
what others should know before they load it.

No row and no path of this machine is in it. What a person has changed in a card is theirs: such a card is not
replaced.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from veneer.evaluation.compare import Comparison, Scores
from veneer.files import write_text
from veneer.models.origin import hub_id, is_local
from veneer.models.problems import PROBLEMS
from veneer.reporting.heatmap import ranks_of
from veneer.reporting.loading import LoadedBy, Recipe, own_tokens, ways_to_load
from veneer.runs.facts import CARD_NAME, Facts, read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.start import started_from
from veneer.updates.adapter_file import read_tensors
from veneer.updates.peft_config import CONFIG_NAME, from_peft, read_fields

PLACE = "ADAPTER"  # how the commands call the adapter's folder
_MODEL = "MODEL"  # and a model's
_BASE = "BASE"  # and a base that is known by no name but a path of one machine
_WRITTEN = re.compile(r"\n<!-- Written by Veneer\. sha256 of the text above: ([0-9a-f]{64}) -->\n$")
_PIPELINES = {"SEQ_CLS": "text-classification", "SEQ_2_SEQ_LM": "text2text-generation"}
_MEASURES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "choice_accuracy": "accuracy",
    "exact_match": "exact_match",
    "preferred": "accuracy",
    "micro_f1": "f1",
    "mse": "mse",
    "mae": "mae",
    "r2": "r_squared",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
_TITLES = {
    "loss": "loss (mean of a learned token, nats)", "perplexity": "perplexity", "choice_accuracy": "choice accuracy",
    "exact_match": "exact match", "preferred": "chosen likelier than rejected",
    "micro_f1": "F1 over all rows and labels (micro)", "mse": "mean squared error", "mae": "mean absolute error",
    "r2": "R²", "pearson": "Pearson correlation", "spearman": "Spearman correlation",
}  # fmt: skip
_OWN = {"full": "Full fine-tuning", "bias": "Fine-tuning of the biases", "head": "Fine-tuning of the head"}
_TASKS = {**dict.fromkeys(PROBLEMS, "text-classification"), "seq2seq": "text2text-generation"}
_SHARES = ("choice_accuracy", "exact_match", "preferred", "micro_f1")


@dataclass(frozen=True)
class _Described:
    """An adapter, or a model whose own weights were trained, as its card describes it."""

    facts: Facts | None
    fields: dict[str, Any]  # of adapter_config.json; none of a model
    ranks: dict[str, int]  # module → rank; none of a model

    @classmethod
    def of(cls, folder: Path) -> _Described:
        if not (folder / CONFIG_NAME).is_file():
            return cls(read_facts(folder), {}, {})
        shapes = {key: tuple(tensor.shape) for key, tensor in read_tensors(folder).items()}
        return cls(read_facts(folder), read_fields(folder), ranks_of(shapes, from_peft(folder)))

    @property
    def rank(self) -> int:
        """The largest; 0 of a model."""
        return max(self.ranks.values(), default=0)

    @property
    def own_weights(self) -> bool:
        """Whether the model's own were trained, so that there is no adapter."""
        return not self.fields

    @property
    def what(self) -> str:
        return "model" if self.own_weights else "adapter"

    @property
    def source(self) -> str:
        if self.own_weights and self.facts is not None:
            return self.facts.base.name if hub_id(self.facts.base.name) else ""
        return str(self.fields.get("base_model_name_or_path") or "")

    @property
    def base(self) -> str:
        """Its base's name without any path."""
        if self.source and not is_local(self.source):
            return self.source
        return f"a local model, {self.facts.base.name}" if self.facts else "a local model"

    @property
    def model(self) -> str:
        """The base in commands."""
        return self.source if self.source and not is_local(self.source) else _BASE

    @property
    def method(self) -> str:
        if self.own_weights and self.facts is not None:
            return _OWN[self.facts.method]
        return "AdaLoRA" if self.fields.get("peft_type") == "ADALORA" else "LoRA"

    @property
    def pipeline(self) -> str:
        if self.own_weights and self.facts is not None:
            return _TASKS.get(self.facts.task, "text-generation")
        return _PIPELINES.get(str(self.fields.get("task_type")), "text-generation")


def write_card(folder: Path, called: str = PLACE) -> str:
    """Write the card of an adapter's folder, or of a run's model, whose commands call it ``called``. A sentence where
    there is one that a person has changed, and that is left as it is; else nothing. Raises OSError."""
    path = folder / CARD_NAME
    if is_edited(path):
        return f"{path} has been edited, so it is left as it is; delete it to have a new one written."
    write_text(path, card_text(folder, called))
    return ""


def is_edited(card: Path) -> bool:
    """Whether there is a card that is not as Veneer wrote it."""
    if not card.exists():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    mark = _WRITTEN.search(text)
    return mark is None or _digest(text[: mark.start()]) != mark[1]


def card_text(folder: Path, called: str = PLACE) -> str:
    """The card of an adapter's folder, or of a run's model with its veneer.json."""
    described = _Described.of(folder)
    if described.own_weights:
        return _model_card(described, _MODEL if called == PLACE else called)
    facts = described.facts
    adapter = LoadedBy(
        described.fields, described.ranks, described.model, called, called, "merged", "plain", "adapter",
        facts.classes if facts else [], facts.kept if facts else {"storage": "fp32", "block_size": 64},
        own_tokens(facts), facts.base.kind if facts else "", problem=facts.task if facts else "",
    )  # fmt: skip
    where = f"`{called}` is this folder." if called == PLACE else f"`{called}` is on the Hugging Face hub."
    if described.model == _BASE:
        where += f" `{_BASE}` is its base, {described.base}, as a transformers folder."
    parts = [
        f"# {described.method} adapter for {described.base}",
        _introduction(described),
        *_trained(described),
        f"## How to load it\n\n{where}",
        f"### Veneer\n\n```bash\nveneer {_verb(described)}\n```".replace(PLACE, called),
        *map(_recipe, ways_to_load(adapter)),
    ]
    return _signed(_front(described, "peft", "adapter") + "\n\n".join(parts) + "\n")


def _model_card(described: _Described, called: str) -> str:
    """The card of a model whose own weights a run trained."""
    facts = described.facts
    assert facts is not None
    where = f"`{called}` is this folder." if called == _MODEL else f"`{called}` is on the Hugging Face hub."
    parts = [
        f"# {described.base}, fine-tuned",
        f"{described.method} of {described.base} ({facts.base.kind}, {facts.base.parameters:,} parameters), trained "
        f"with Veneer. These are all weights of the model; no base is needed beside them.",
        *_trained(described),
        f"## How to load it\n\n{where}",
        f"### Veneer\n\n```bash\nveneer {_verb(described)}\n```".replace(PLACE, called),
        f"### transformers\n\n```python\n{_transformers(described, called)}\n```",
    ]
    return _signed(_front(described, "transformers", "finetune") + "\n\n".join(parts) + "\n")


def write_merged_card(folder: Path, adapter: Path, storage: str) -> None:
    """Write the card of a model into which ``adapter`` was merged. Raises OSError."""
    described = _Described.of(adapter)
    parts = [
        f"# {described.base}, fine-tuned",
        f"{_introduction(described)} It is merged into the base's weights, in {storage}.",
        *_trained(described),
        f"## How to load it\n\n`MODEL` is this folder.\n\n```python\n{_transformers(described)}\n```",
    ]
    write_text(folder / CARD_NAME, _signed(_front(described, "transformers", "finetune") + "\n\n".join(parts) + "\n"))


def put_scores(run: RunFolder, measured: Comparison) -> str:
    """Put what was measured of a run's held-out rows into its result's veneer.json and card: `write_card`."""
    folder = run.result()
    facts = read_facts(folder) if folder is not None else None
    if folder is None or facts is None:
        return ""
    scores = {name: pair for name in _MEASURES if None not in (pair := _pair(measured.base, measured.adapter, name))}
    facts.model_copy(update={"scores": scores}).write(folder)
    return write_card(folder)


def _pair(base: Scores, adapter: Scores, name: str) -> tuple[float | None, float | None]:
    if base.numbers is not None and hasattr(base.numbers, name):
        return getattr(base.numbers, name), getattr(adapter.numbers, name)
    return getattr(base, name, None), getattr(adapter, name, None)


def _front(described: _Described, library: str, relation: str) -> str:
    """The YAML that the hub reads."""
    facts = described.facts
    known = hub_id(described.source) if described.source else None
    data = ModelCardData(
        base_model=known, library_name=library, pipeline_tag=described.pipeline,
        license=facts.base.license if facts else None, tags=["veneer", described.method.lower().replace(" ", "-")],
        base_model_relation=relation if known else None,
        eval_results=_results(described, facts) if facts and facts.scores else None,
        model_name=f"{described.method}{'' if described.own_weights else ' adapter'}",
    )  # fmt: skip
    if not data.eval_results:
        data.model_name = None
    text = f"---\n{data.to_yaml()}\n---\n"
    ModelCard(text)  # refuses what is no valid front matter
    return text + "\n"


def _results(described: _Described, facts: Facts) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=described.pipeline,
            dataset_type="held-out-rows",
            dataset_name="held-out rows of its own data",
            metric_type=_MEASURES[name],
            metric_value=round(after, 6),
            metric_name=_title(name, facts),
        )
        for name, (_, after) in facts.scores.items()
        if after is not None
    ]


def _introduction(described: _Described) -> str:
    article = "An" if described.method == "AdaLoRA" else "A"
    text = f"{article} {described.method} adapter of rank {described.rank} for {described.base}"
    facts = described.facts
    if facts is not None:
        text += f" ({facts.base.kind}, {facts.base.parameters:,} parameters)"
    return f"{text}, trained with Veneer."


def _trained(described: _Described) -> list[str]:
    """What it was trained on and how, and what was measured."""
    facts = described.facts
    if facts is None:
        return []
    rows, prompts = facts.rows, facts.prompts
    lines = [
        f"- Rows: {rows.train:,} of the shape {rows.shape}; {rows.held_out:,} more were held out.",
        f"- Steps: {facts.steps:,}." + ("" if described.own_weights else f" Base kept in {facts.kept['storage']}."),
        *([f"- Began from the adapter {', then '.join(map(started_from, facts.began))}."] if facts.began else []),
        *_asked_for(facts),
        *(["- Questions are asked in the chat template."] if prompts.chat and not facts.classes else []),
        *(["- All conversations begin with one system message, which is in `veneer.json`."] if prompts.system else []),
        *(f"- `{name}`: {value}" for name, value in facts.options.items()),
    ]
    parts = ["## How it was trained\n\n" + "\n".join(lines)]
    if facts.scores:
        table = [f"| on held-out rows | base | {described.what} |", "|---|---|---|"]
        table += [
            f"| {_title(name, facts)} | {_number(name, a)} | {_number(name, b)} |"
            for name, (a, b) in facts.scores.items()
        ]
        parts.append("## Scores\n\n" + "\n".join(table))
    return parts


def _title(name: str, facts: Facts) -> str:
    return "loss" if name == "loss" and facts.task in ("multi-label", "regression") else _TITLES[name]


def _asked_for(facts: Facts) -> list[str]:
    """What a classifier answers with, as a line of a list."""
    if facts.task == "regression":
        return ["- It gives a number for a text."]
    kind = "Labels, any of which a text may have" if facts.task == "multi-label" else "Classes"
    return [f"- {kind}: {', '.join(facts.classes)}."] if facts.classes else []


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if name in _SHARES else f"{value:.4g}"


def _verb(described: _Described) -> str:
    chat = described.facts is not None and described.facts.prompts.chat and not described.facts.classes
    return f"chat {PLACE}" if chat else f"generate {PLACE} 'a prompt'"


def _recipe(recipe: Recipe) -> str:
    note = [recipe.note] if recipe.note else []
    return "\n\n".join([f"### {recipe.title}", *note, *(f"```{kind}\n{text}\n```" for kind, text in recipe.parts)])


def _transformers(described: _Described, called: str = _MODEL) -> str:
    kind = {"text-classification": "SequenceClassification", "text2text-generation": "Seq2SeqLM"}.get(
        described.pipeline
    )
    name = f"AutoModelFor{kind or 'CausalLM'}"
    return (
        f"from transformers import {name}, AutoTokenizer\n\n"
        f'model = {name}.from_pretrained("{called}")\ntokenizer = AutoTokenizer.from_pretrained("{called}")'
    )


def _signed(text: str) -> str:
    return f"{text}\n<!-- Written by Veneer. sha256 of the text above: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
