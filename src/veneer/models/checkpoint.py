"""What a source resolves to, looked up once: where its files are, of which kind, and what is in them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers

from veneer.errors import ConfigError, ModelError
from veneer.frozen.layers import DTYPES
from veneer.frozen.text_part import text_config_of
from veneer.models import converted
from veneer.models.bnb_file import holds_codes, refuse_8_bits, says_bitsandbytes
from veneer.models.gguf_config import UNKNOWN_TO_TRANSFORMERS, gguf_config
from veneer.models.gguf_file import GgufFile
from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_words import split_as_written
from veneer.models.library import call_library, no_model, quiet
from veneer.models.other_forms import refuse_other_forms
from veneer.models.own_code import refuse_own_config, refuse_own_tokenizer
from veneer.models.packaged import PACKAGED_MODELS
from veneer.models.problems import ONE_NUMBER, PROBLEMS, TYPES, problem_of
from veneer.models.source import resolve, tokenizer_folder
from veneer.models.tensors import SafetensorsFolder, Tensors

Task = Literal["auto", "causal", "seq2seq", "classification", "multi-label", "regression"]
CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
}


_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "tekken.json")


class Checkpoint:
    """A model on this disk, or on the hub: what `load` takes, and whatever asks about a model before it is loaded.

    ``called``: what a person calls it. ``name``: under which others find the same base again. ``kind``: "folder",
    "gguf", or "converted" for a GGUF file that the cache holds as a folder. ``notes``: what a person may want to know
    of how it was loaded, as sentences.

    Only the config is read, when it is first asked for; of a hub id no weights are fetched before they are needed.
    Raises ModelError when there is no such model or it is damaged.
    """

    def __init__(self, source: str | Path) -> None:
        self.called = str(source)
        self._place, self.name = resolve(source, config_alone=True)
        self.notes: list[str] = []
        self.cache = converted.folder_of(self._place) if self._place.is_file() else None  # what it is converted to
        self.kind: Literal["folder", "gguf", "converted"] = "folder"
        if self.cache is not None:
            self.kind = "converted" if converted.is_whole(self.cache) else "gguf"
            converted.used(self.cache)

    @cached_property
    def path(self) -> Path:
        """Its folder, or its GGUF file, weights and tokenizer in it: what a hub id lacks is fetched now."""
        if self.cache is not None:
            return self.cache if self.kind == "converted" else self._place
        return self._place if self._on_this_disk else resolve(self.name)[0]

    @property
    def _on_this_disk(self) -> bool:
        return self.cache is not None or self.name == str(self._place) or self.name in PACKAGED_MODELS

    @property
    def has_revision(self) -> bool:
        """Whether it is a hub id with a revision, which ``name`` then has as a commit."""
        return not self._on_this_disk and "@" in self.name

    @property
    def _is_fetched(self) -> bool:
        return self._on_this_disk or "path" in self.__dict__

    @cached_property
    def config(self) -> Any:
        """transformers' config of it. It is this checkpoint's own: copy it before you change it.

        Raises ModelError for a GGUF file with keys that are not known.
        """
        if self.kind == "gguf":
            with quiet():
                return gguf_config(self.gguf)
        place = self._place if self.cache is None else self.path
        refuse_own_config(place, self.name)
        with quiet():
            made = call_library(
                transformers.AutoConfig.from_pretrained, no_model(self.name), trust_remote_code=False,
                **_pretrained(place),
            )  # fmt: skip
        refuse_other_forms(made, self.name)
        return made

    @cached_property
    def gguf(self) -> GgufHeader:
        """What a GGUF file says before its tensors' values."""
        return GgufHeader(self._place, self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, as the config says; fp32 for a GGUF file and where it says nothing."""
        said = getattr(self.config, "dtype", None) if self.kind == "folder" else None
        return next((dtype for dtype in DTYPES.values() if dtype is said), torch.float32)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it has, as its config says; None where that says nothing."""
        return getattr(text_config_of(self.config), "vocab_size", None)

    @property
    def is_bitsandbytes(self) -> bool:
        """Whether bitsandbytes keeps it in 4 bits, as its config says, and its weights, once they are on this disk: a
        merged model may have kept the config. Raises ModelError for one in 8 bits, which cannot be read."""
        if self.kind != "folder" or not says_bitsandbytes(self.config):
            return False
        if self._is_fetched and not holds_codes(names := self.safetensors().names()) and names:
            return False
        refuse_8_bits(self.config, self.name)
        return True

    @property
    def has_tokenizer(self) -> bool:
        """Whether it comes with a tokenizer's files, read or not; a GGUF file has one in it."""
        return self.kind == "gguf" or any(next(self.path.glob(name), None) for name in _TOKENIZER_FILES)

    @property
    def generates_text(self) -> bool:
        """Whether it is a language model, as a GGUF file is and the config of another says; an encoder or a classifier
        is none."""
        return self.kind != "folder" or _of_a_language_model(self.config)

    def task(self, asked: Task = "auto", labels: list[str] | None = None) -> str:
        """causal, seq2seq or classification, of whatever problem: as ``asked`` for, or as labels and config say.

        Raises ModelError for "auto" where it generates no text and there are no labels, ConfigError for another task.
        """
        if asked not in get_args(Task):
            raise ConfigError(f"task = {asked!r} is not one of {', '.join(get_args(Task))}.")
        if asked != "auto":
            return "classification" if asked in PROBLEMS else asked
        architecture = _architecture(self.config)
        if labels or architecture.endswith("ForSequenceClassification"):
            return "classification"
        if getattr(self.config, "is_encoder_decoder", False):
            return "seq2seq"
        if not _of_a_language_model(self.config):
            raise ModelError(
                f"{self.name} is a {architecture}, which generates no text; give the names of its classes (labels) to "
                f"train it as a classifier."
            )
        return "causal"

    def pretrained(self) -> dict[str, Path | str]:
        """The arguments by which transformers' ``from_pretrained`` finds it."""
        return _pretrained(self.path)

    def tensors(self) -> Tensors:
        """Its tensors, one at a time. Raises NotTensorByTensor where they are not the model's own, ModelError for a
        damaged file."""
        return GgufFile(self.gguf) if self.kind == "gguf" else self.safetensors()

    def safetensors(self) -> SafetensorsFolder:
        """The tensors of a folder, which can be mapped, too."""
        return SafetensorsFolder(self.path, self.name)

    def tokenizer(self) -> Any:
        """A tokenizer of its own for each call, for which no weights are fetched. Raises ModelError when there is none,
        or none with words in it."""
        place = self.path if self._is_fetched else tokenizer_folder(self.name)
        refusal = f"{self.name} has no tokenizer that can be read (tokenizer.json)"
        refuse_own_tokenizer(place, self.name)
        # transformers' own choice knows fewer architectures than are read, and a tokenizer's kind needs none.
        unknown = self.kind == "gguf" and self.gguf.architecture in UNKNOWN_TO_TRANSFORMERS
        chosen = transformers.PreTrainedTokenizerFast if unknown else transformers.AutoTokenizer
        with quiet():
            made = call_library(chosen.from_pretrained, refusal, trust_remote_code=False, **_pretrained(place))
            call_library(made, refusal, "a")  # what its files set wrongly is only found in use
        if self.kind == "gguf":
            self.notes += [note for note in split_as_written(made, self.gguf) if note not in self.notes]
        if set(made.get_vocab()) <= set(made.all_special_tokens):  # one without words, made up by transformers
            raise ModelError(f"{self.name} has no tokenizer: save one beside the model with tokenizer.save_pretrained.")
        return made

    def generation_config(self) -> Any | None:
        """transformers' options of generation that come with it, if there are any."""
        folder = self.path.parent if self.kind == "gguf" else self.path
        if not (folder / "generation_config.json").is_file():
            return None
        return call_library(transformers.GenerationConfig.from_pretrained, no_model(self.name), folder)

    def weight_bytes(self) -> int:
        """Bytes of the weights on this disk; 0 where they are still to be fetched from the hub."""
        if self._place.is_file():
            return self._place.stat().st_size
        files = [*self._place.glob("*.safetensors")] or [*self._place.glob("*.bin")]
        return sum(file.stat().st_size for file in files if file.is_file())


def name_classes(config: Any, labels: list[str] | None, task: Task = "auto") -> None:
    """Put the names of a classifier's classes into transformers' ``config`` of it, and what it is asked by its
    ``task``. Raises ConfigError for more than one number."""
    if task == "regression":
        labels = labels or [*ONE_NUMBER]
        if len(labels) > 1:
            raise ConfigError(f"task: regression gives one number, and there are {len(labels)} labels.")
    if labels:
        config.num_labels = len(labels)
        config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    if task in ("multi-label", "regression") or (task == "classification" and problem_of(config) != task):
        config.problem_type = next(name for name, problem in TYPES.items() if problem == task)


def checkpoint_of(source: str | Path | Checkpoint) -> Checkpoint:
    """``source`` itself where it is resolved already."""
    return source if isinstance(source, Checkpoint) else Checkpoint(source)


def _pretrained(path: Path) -> dict[str, Path | str]:
    if path.is_dir():
        return {"pretrained_model_name_or_path": path}
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


def _architecture(config: Any) -> str:
    """The class that a config names first; "" where it names none."""
    named = getattr(config, "architectures", None)
    return str(named[0]) if isinstance(named, list) and named else ""


def _of_a_language_model(config: Any) -> bool:
    named = _architecture(config)
    return not named or named.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
