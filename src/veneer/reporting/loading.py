"""How others load what a run trained: the commands for this very adapter, or why one of them cannot take it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.models.packaged import PACKAGED_MODELS
from veneer.runs.folder import RunFolder
from veneer.runs.history import RunHistory
from veneer.training.config import TrainConfig

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that its --max-lora-rank takes
_CLASSES = {"SEQ_CLS": "SequenceClassification", "SEQ_2_SEQ_LM": "Seq2SeqLM"}  # by PEFT's task_type; else CausalLM


@dataclass(frozen=True)
class Recipe:
    """``parts``: (language, text) of the blocks to run, in order; none where it cannot be done, as ``note`` says."""

    title: str
    parts: tuple[tuple[str, str], ...]
    note: str = ""


@dataclass(frozen=True)
class _Adapter:
    """What the commands depend on. ``base``: what transformers loads."""

    run: RunFolder
    config: TrainConfig
    fields: dict[str, Any]  # of adapter_config.json
    rank: int  # the largest
    folder: str = "base"

    @property
    def path(self) -> Path:
        return self.run.adapter

    @property
    def model(self) -> str:
        """The base as Veneer loads it."""
        return self.run.base_source(self.config)

    @property
    def from_gguf(self) -> bool:
        model = self.model
        packaged = PACKAGED_MODELS[model].inside if model in PACKAGED_MODELS else model
        return packaged.endswith(".gguf")

    @property
    def base(self) -> str:
        model = self.model
        return self.folder if self.from_gguf or model in PACKAGED_MODELS else model

    @property
    def kind(self) -> str:
        return _CLASSES.get(str(self.fields.get("task_type")), "CausalLM")

    @property
    def whole_modules(self) -> list[str]:
        """Modules trained whole, beside the low-rank updates."""
        return list(self.fields.get("modules_to_save") or self.fields.get("trainable_token_indices") or [])

    @property
    def needs_export(self) -> bool:
        """Whether vLLM and llama.cpp would read it wrongly, or not at all."""
        patterns = self.fields.get("rank_pattern") or self.fields.get("alpha_pattern")
        return self.config.method == "adalora" or bool(patterns) or bool(self.fields.get("use_rslora"))

    @property
    def plain(self) -> Path:
        return self.run.path / "plain" if self.needs_export else self.path


def recipes(run: RunHistory, rank: int) -> list[Recipe]:
    """The ways to load a finished run's adapter, whose largest rank is ``rank``."""
    fields = json.loads((run.folder.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    adapter = _Adapter(run.folder, run.config, fields, rank)
    first = [_base_folder(adapter)] if adapter.base == adapter.folder else []
    return [*first, _peft(adapter), _transformers(adapter), _vllm(adapter), _llama_cpp(adapter)]


def _base_folder(adapter: _Adapter) -> Recipe:
    load = f"veneer.load({adapter.model!r})"
    code = f"import veneer\n\nfor part in {load}:\n    part.save_pretrained({adapter.base!r})"
    what = "a GGUF file" if adapter.from_gguf else "a folder inside a Python package"
    return Recipe(
        "First: the base as a transformers folder", (("python", code),),
        f"The base of this run is {what}; what follows loads it from a folder.",
    )  # fmt: skip


def _peft(adapter: _Adapter) -> Recipe:
    four_bits, note = _storage(adapter.config)
    names = [f"AutoModelFor{adapter.kind}", "AutoTokenizer", *(["BitsAndBytesConfig"] if four_bits else [])]
    arguments = [repr(adapter.base)]
    before = ""
    if four_bits:
        before = f"kept = {four_bits}\n"
        arguments.append("quantization_config=kept")
    if adapter.kind == "SequenceClassification":
        arguments.append(f"num_labels={len(_classes(adapter.run.path))}")
    code = (
        f"from peft import PeftModel\nfrom transformers import {', '.join(names)}\n\n{before}"
        f"base = AutoModelFor{adapter.kind}.from_pretrained({', '.join(arguments)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({adapter.base!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(adapter.path)!r})"
    )
    return Recipe("peft", (("python", code),), note)


def _storage(config: TrainConfig) -> tuple[str, str]:
    """The base's storage in bitsandbytes' words, and what differs all the same."""
    if config.storage in ("nf4", "fp4") and config.block_size == 64:
        code = (
            f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{config.storage}", '
            f"bnb_4bit_use_double_quant={config.double_quantisation})"
        )
        return code, ""
    if config.storage not in ("fp32", "bf16", "fp16"):
        return "", (
            f"The adapter was trained over a base in {config.storage}, blocks of {config.block_size}, which these do "
            f"not have: over the base as it is loaded here it answers a little differently."
        )
    return "", ""


def _transformers(adapter: _Adapter) -> Recipe:
    merged = str(adapter.run.path / "merged")
    code = (
        f"from transformers import AutoModelFor{adapter.kind}, AutoTokenizer\n\n"
        f"model = AutoModelFor{adapter.kind}.from_pretrained({merged!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({merged!r})"
    )
    return Recipe(
        "transformers, without peft", (("bash", _merge(adapter)), ("python", code)),
        "The adapter is folded into the base's weights.",
    )  # fmt: skip


def _vllm(adapter: _Adapter) -> Recipe:
    refusal = _only_causal("vLLM's adapters are for", adapter)
    if refusal:
        return Recipe("vLLM", (), refusal)
    if adapter.whole_modules:
        merged = shlex.quote(str(adapter.run.path / "merged"))
        return Recipe("vLLM", (("bash", f"{_merge(adapter)}\nvllm serve {merged}"),), _whole(adapter, "vLLM"))
    largest = next((rank for rank in _VLLM_RANKS if rank >= adapter.rank), None)
    if largest is None:
        return Recipe(
            "vLLM", (), f"It takes ranks up to {_VLLM_RANKS[-1]}, and this is {adapter.rank}: merge the adapter."
        )
    name = adapter.run.path.resolve().name
    serve = (
        f"vllm serve {shlex.quote(adapter.base)} --enable-lora --max-lora-rank {largest} \\\n"
        f"    --lora-modules {shlex.quote(f'{name}={adapter.plain}')}"
    )
    return Recipe(
        "vLLM", (("bash", "\n".join([*_exported(adapter), serve])),), f"Requests ask for it as the model {name}."
    )


def _llama_cpp(adapter: _Adapter) -> Recipe:
    refusal = _only_causal("This way is for", adapter)
    if refusal:
        return Recipe("llama.cpp", (), refusal)
    convert = "python llama.cpp/convert_hf_to_gguf.py"
    if adapter.whole_modules:
        merged = shlex.quote(str(adapter.run.path / "merged"))
        lines = [_merge(adapter), f"{convert} {merged} --outfile merged.gguf", "llama-cli -m merged.gguf"]
        return Recipe("llama.cpp", (("bash", "\n".join(lines)),), _whole(adapter, "llama.cpp"))
    base = shlex.quote(adapter.base)
    own = adapter.model if adapter.from_gguf and adapter.model not in PACKAGED_MODELS else None
    lora = f"{shlex.quote(str(adapter.plain))} --base {base} --outfile adapter.gguf"
    lines = [
        *_exported(adapter),
        *([] if own else [f"{convert} {base} --outfile base.gguf"]),
        f"python llama.cpp/convert_lora_to_gguf.py {lora}",
        f"llama-cli -m {shlex.quote(own or 'base.gguf')} --lora adapter.gguf",
    ]
    note = "llama.cpp/ is a checkout of its sources, which hold the converters."
    return Recipe("llama.cpp", (("bash", "\n".join(lines)),), note)


def _only_causal(begin: str, adapter: _Adapter) -> str:
    what = {"SequenceClassification": "a classifier", "Seq2SeqLM": "an encoder-decoder"}.get(adapter.kind)
    return f"{begin} causal language models, and this is {what}." if what else ""


def _whole(adapter: _Adapter, who: str) -> str:
    named = ", ".join(map(str, adapter.whole_modules[:3]))
    return f"{who} loads low-rank updates only, and this run trained more ({named}), so the adapter is merged first."


def _merge(adapter: _Adapter) -> str:
    return f"veneer merge {shlex.quote(str(adapter.run))} {shlex.quote(str(adapter.run.path / 'merged'))}"


def _exported(adapter: _Adapter) -> list[str]:
    if not adapter.needs_export:
        return []
    return [f"veneer export {shlex.quote(str(adapter.run))} {shlex.quote(str(adapter.plain))}"]


def _classes(run: Path) -> list[str]:
    return list(json.loads((run / "rows.json").read_text(encoding="utf-8"))["classes"])
