"""The Modelfile by which ollama create makes a model of a GGUF file: conversations are asked as they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.data.go_template import PROMPT_ALONE, written
from veneer.data.labels import Renderer
from veneer.data.template import ChatTemplate
from veneer.errors import DataError, ModelError
from veneer.files import write_text

MODELFILE = "Modelfile"


def modelfile(renderer: Renderer, lines: list[str], *, chat: bool, system: str | None) -> tuple[str, list[str]]:
    """A Modelfile's text, and what a person may want to know, as sentences. ``lines``: FROM, and ADAPTER where there is
    one; ``chat``: whether questions are asked in the chat template; ``system``: the system message of all rows.

    Raises ModelError for a chat template that Ollama's language of templates cannot express.
    """
    template, notes = PROMPT_ALONE, []
    if chat and renderer.tokenizer.chat_template:
        template, takes_system = _template(renderer)
        if not takes_system:
            notes.append("The chat template takes no system message; Ollama leaves one out.")
    stops = [str(renderer.tokenizer.convert_ids_to_tokens(token)) for token in renderer.ends()]
    parts = [*lines, f"TEMPLATE {_quoted(template)}", *([f"SYSTEM {_quoted(system)}"] if system else [])]
    parts += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(parts) + "\n", notes


def write_modelfile(folder: Path, text: str) -> None:
    """Write it into a folder. Raises OSError."""
    write_text(folder / MODELFILE, text)


def _template(renderer: Renderer) -> tuple[str, bool]:
    tokenizer = renderer.tokenizer
    chat = ChatTemplate(tokenizer, renderer.arguments, renderer.fold_turns)
    begin = _put_before_text(tokenizer)

    def ask(messages: list[dict[str, Any]]) -> str:
        # Ollama puts the begin token before a prompt, where the tokenizer does: written here, too, it would be twice.
        return chat.question(tuple(messages), "a conversation").removeprefix(begin)

    try:
        return written(ask)
    except DataError as reason:
        raise ModelError(
            f"The chat template of {tokenizer.name_or_path} cannot be written in Ollama's language: {reason}. A GGUF "
            f"file holds the template itself (format: gguf)."
        ) from None


def _put_before_text(tokenizer: Any) -> str:
    """The begin token, where the tokenizer puts it before a text by itself."""
    begin = tokenizer.bos_token or ""
    return begin if begin and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""


def _quoted(text: str) -> str:
    """A text as Modelfiles have it. Raises ModelError for one that they cannot have."""
    if '"""' in text:
        raise ModelError('A Modelfile cannot have a text with """ in it; export as GGUF instead (format: gguf).')
    return f'"""{text}"""'
