"""How others load what a run trained: the commands for this very adapter, or why one of them cannot take it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.models.hub_cache import HubId
from veneer.models.origin import hub_id
from veneer.models.packaged import PACKAGED_MODELS
from veneer.models.problems import TYPES
from veneer.reporting.vllm_rules import max_rank, why_merged
from veneer.runs.facts import Facts, read_facts
from veneer.runs.history import RunHistory
from veneer.updates.peft_config import read_fields

_CLASSES = {"SEQ_CLS": "SequenceClassification", "SEQ_2_SEQ_LM": "Seq2SeqLM"}  # by PEFT's task_type; else CausalLM


@dataclass(frozen=True)
class Recipe:
    """``parts``: (language, text) of the blocks to run, in order; none where it cannot be done, as ``note`` says."""

    title: str
    parts: tuple[tuple[str, str], ...]
    note: str = ""


@dataclass(frozen=True)
class LoadedBy:
    """What the commands depend on."""

    fields: dict[str, Any]  # of adapter_config.json
    ranks: Mapping[str, int]  # module → rank
    model: str  # the base as Veneer loads it
    source: str  # what veneer merge and export are given
    path: str  # the adapter's folder
    merged: str  # where a merged model goes
    exported: str  # where a plain LoRA goes
    name: str  # the adapter's, in requests to a server
    classes: list[str]
    kept: dict[str, Any]  # storage, block_size, double_quantisation
    tokens: int | None = None  # of the base, where the adapter's folder has a tokenizer of its own
    family: str = ""  # transformers' class of the base, where the adapter says so
    folder: str = "base"
    problem: str = ""  # of a classifier: what it is asked

    @property
    def from_gguf(self) -> bool:
        model = self.model
        packaged = PACKAGED_MODELS[model].inside if model in PACKAGED_MODELS else model
        return packaged.endswith(".gguf")

    @property
    def in_its_own_file(self) -> bool:
        """Whether the base is a GGUF file of the person's own, and was trained over as it is."""
        return self.from_gguf and self.model not in PACKAGED_MODELS and self.kept["storage"] in ("fp32", "bf16", "fp16")

    @property
    def base(self) -> str:
        """The base as transformers loads it."""
        model = self.model
        if self.from_gguf or model in PACKAGED_MODELS:
            return self.folder
        return self._hub.repository if self._hub else model

    @property
    def revision(self) -> str:
        """The argument that names the base's commit, where it is a hub id with one."""
        return f"revision={self._hub.revision!r}" if self._hub and self._hub.revision else ""

    @property
    def _hub(self) -> HubId | None:
        return HubId.of(self.model) if hub_id(self.model) else None

    @property
    def kind(self) -> str:
        task = self.fields.get("task_type")
        if task == "CAUSAL_LM" and self.family.endswith("ForConditionalGeneration"):  # of images or sound and text
            return "MultimodalLM"
        return _CLASSES.get(str(task), "CausalLM")

    @property
    def beside(self) -> list[str]:
        """What is trained beside the low-rank updates of layers: modules whole, rows of them, DoRA's magnitudes, or
        parameters of experts."""
        whole = list(self.fields.get("modules_to_save") or self.fields.get("trainable_token_indices") or [])
        experts = self.fields.get("target_parameters") or []
        return [*whole, *(["magnitudes, by DoRA"] if self.fields.get("use_dora") else []), *experts]

    @property
    def needs_export(self) -> bool:
        """Whether vLLM and llama.cpp would read it wrongly, or not at all."""
        patterns = self.fields.get("rank_pattern") or self.fields.get("alpha_pattern")
        adalora = self.fields.get("peft_type") == "ADALORA"
        return adalora or bool(patterns) or bool(self.fields.get("use_rslora"))

    @property
    def plain(self) -> str:
        return self.exported if self.needs_export else self.path


def recipes(run: RunHistory, ranks: Mapping[str, int]) -> list[Recipe]:
    """The ways to load a finished run's adapter, whose modules have these ``ranks``."""
    folder, config = run.folder, run.config
    facts = read_facts(folder.adapter)
    fields = read_fields(folder.adapter)
    adapter = LoadedBy(
        fields, ranks, folder.base_source(config), str(folder), str(folder.adapter), str(folder.path / "merged"),
        str(folder.path / "plain"), folder.path.resolve().name, list(run.rows.get("classes") or []), config.kept(),
        own_tokens(facts), facts.base.kind if facts else "", problem=facts.task if facts else "",
    )  # fmt: skip
    return ways_to_load(adapter)


def own_tokens(facts: Facts | None) -> int | None:
    """How many tokens the base has, where the adapter's folder has a tokenizer of its own."""
    return facts.base.tokens if facts is not None and facts.own_tokenizer else None


def ways_to_load(adapter: LoadedBy) -> list[Recipe]:
    """The ways to load an adapter, wherever it is."""
    first = [_base_folder(adapter)] if adapter.base == adapter.folder else []
    own = [_llama_cpp(adapter), _ollama(adapter), _mlx(adapter)]
    return [*first, _peft(adapter), _transformers(adapter), _vllm(adapter), *own]


def _base_folder(adapter: LoadedBy) -> Recipe:
    load = f"veneer.load({adapter.model!r})"
    code = f"import veneer\n\nfor part in {load}:\n    part.save_pretrained({adapter.base!r})"
    what = "a GGUF file" if adapter.from_gguf else "a folder inside a Python package"
    return Recipe(
        "First: the base as a transformers folder", (("python", code),),
        f"The base of this run is {what}; what follows loads it from a folder.",
    )  # fmt: skip


def _peft(adapter: LoadedBy) -> Recipe:
    four_bits, note = _storage(adapter.kept)
    names = [f"AutoModelFor{adapter.kind}", "AutoTokenizer", *(["BitsAndBytesConfig"] if four_bits else [])]
    arguments = [repr(adapter.base), *([adapter.revision] if adapter.revision else [])]
    before = ""
    resize = "" if adapter.tokens is None else f"base.resize_token_embeddings({adapter.tokens})\n"
    if four_bits:
        before = f"kept = {four_bits}\n"
        arguments.append("quantization_config=kept")
    if adapter.kind == "SequenceClassification" and adapter.classes:
        before += f"classes = {adapter.classes!r}\n"
        arguments += ["num_labels=len(classes)", "id2label=dict(enumerate(classes))"]
        arguments.append("label2id={name: number for number, name in enumerate(classes)}")
        types = {problem: name for name, problem in TYPES.items() if problem != "classification"}
        arguments += [f"problem_type={types[adapter.problem]!r}"] if adapter.problem in types else []
    code = (
        f"from peft import PeftModel\nfrom transformers import {', '.join(names)}\n\n{before}"
        f"base = AutoModelFor{adapter.kind}.from_pretrained({_in_lines(arguments)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({(adapter.base if adapter.tokens is None else adapter.path)!r})\n"
        f"{resize}model = PeftModel.from_pretrained(base, {adapter.path!r})"
    )
    return Recipe("peft", (("python", code),), note)


def _in_lines(arguments: list[str]) -> str:
    """Arguments of a call, one a line where they are many."""
    short = ", ".join(arguments)
    return short if len(short) < 90 else "\n" + "".join(f"    {argument},\n" for argument in arguments)


def _storage(kept: dict[str, Any]) -> tuple[str, str]:
    """The base's storage in bitsandbytes' words, and what differs all the same."""
    storage, block_size = kept["storage"], kept["block_size"]
    if storage in ("nf4", "fp4") and block_size == 64:
        code = (
            f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{storage}", '
            f"bnb_4bit_use_double_quant={kept['double_quantisation']})"
        )
        return code, ""
    if storage not in ("fp32", "bf16", "fp16"):
        return "", (
            f"The adapter was trained over a base in {storage}, blocks of {block_size}, which these do not have: over "
            f"the base as it is loaded here it answers a little differently."
        )
    return "", ""


def _transformers(adapter: LoadedBy) -> Recipe:
    merged = adapter.merged
    code = (
        f"from transformers import AutoModelFor{adapter.kind}, AutoTokenizer\n\n"
        f"model = AutoModelFor{adapter.kind}.from_pretrained({merged!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({merged!r})"
    )
    return Recipe(
        "transformers, without peft", (("bash", _merge(adapter)), ("python", code)),
        "The adapter is folded into the base's weights.",
    )  # fmt: skip


def _vllm(adapter: LoadedBy) -> Recipe:
    refusal = _only_causal("vLLM's adapters are for", adapter)
    if refusal:
        return Recipe("vLLM", (), refusal)
    reason = _whole(adapter, "vLLM") if adapter.beside else why_merged(adapter.ranks, adapter.family)
    if reason:
        merged = shlex.quote(adapter.merged)
        return Recipe("vLLM", (("bash", f"{_merge(adapter)}\nvllm serve {merged}"),), reason)
    name = adapter.name
    serve = (
        f"vllm serve {shlex.quote(adapter.base)} --enable-lora --max-lora-rank {max_rank(adapter.ranks)} \\\n"
        f"    --lora-modules {shlex.quote(f'{name}={adapter.plain}')}"
    )
    return Recipe(
        "vLLM", (("bash", "\n".join([*_exported(adapter), serve])),), f"Requests ask for it as the model {name}."
    )


def _llama_cpp(adapter: LoadedBy) -> Recipe:
    refusal = _only_causal("This way is for", adapter)
    if refusal:
        return Recipe("llama.cpp", (), refusal)
    if adapter.beside:
        lines = [f"{_merge(adapter)}.gguf --format gguf", f"llama-cli -m {shlex.quote(adapter.merged)}.gguf"]
        return Recipe("llama.cpp", (("bash", "\n".join(lines)),), _whole(adapter, "llama.cpp"))
    own = adapter.model if adapter.in_its_own_file else None
    folder = f"{adapter.exported}-gguf"
    lines = [
        f"veneer export {shlex.quote(adapter.source)} {shlex.quote(folder)} --format gguf",
        f"llama-cli -m {shlex.quote(own or f'{folder}/base.gguf')} --lora {shlex.quote(f'{folder}/adapter.gguf')}",
    ]
    return Recipe("llama.cpp", (("bash", "\n".join(lines)),), "The export refuses a base whose form it does not write.")


def _ollama(adapter: LoadedBy) -> Recipe:
    refusal = _only_causal("This way is for", adapter)
    if refusal:
        return Recipe("Ollama", (), refusal)
    folder, name = f"{adapter.merged}-ollama", adapter.name.lower()
    lines = [
        f"veneer merge {shlex.quote(adapter.source)} {shlex.quote(folder)} --format ollama",
        f"ollama create {shlex.quote(name)} -f {shlex.quote(f'{folder}/Modelfile')}",
    ]
    return Recipe("Ollama", (("bash", "\n".join(lines)),), "The template and the stops are those of the training.")


def _mlx(adapter: LoadedBy) -> Recipe:
    refusal = _only_causal("mlx-lm is for", adapter)
    if refusal:
        return Recipe("MLX", (), refusal)
    if adapter.beside:
        lines = [_merge(adapter), f"mlx_lm.generate --model {shlex.quote(adapter.merged)} --prompt 'a prompt'"]
        return Recipe("MLX", (("bash", "\n".join(lines)),), _whole(adapter, "mlx-lm"))
    folder = f"{adapter.exported}-mlx"
    lines = [
        f"veneer export {shlex.quote(adapter.source)} {shlex.quote(folder)} --format mlx",
        f"mlx_lm.generate --model {shlex.quote(adapter.base)} --adapter-path {shlex.quote(folder)} --prompt 'a prompt'",
    ]
    return Recipe("MLX", (("bash", "\n".join(lines)),), "")


def _only_causal(begin: str, adapter: LoadedBy) -> str:
    what = {"SequenceClassification": "a classifier", "Seq2SeqLM": "an encoder-decoder"}.get(adapter.kind)
    return f"{begin} causal language models, and this is {what}." if what else ""


def _whole(adapter: LoadedBy, who: str) -> str:
    named = ", ".join(map(str, adapter.beside[:3]))
    return f"{who} loads low-rank updates only, and this run trained more ({named}), so the adapter is merged first."


def _merge(adapter: LoadedBy) -> str:
    return f"veneer merge {shlex.quote(adapter.source)} {shlex.quote(adapter.merged)}"


def _exported(adapter: LoadedBy) -> list[str]:
    if not adapter.needs_export:
        return []
    return [f"veneer export {shlex.quote(adapter.source)} {shlex.quote(adapter.plain)}"]
