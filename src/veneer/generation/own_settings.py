"""What of a model's generation_config.json is followed: which tokens end an answer, begin it, and are never said.

What changes how tokens are chosen otherwise is followed where it is given as an option, and named by `not_followed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.data.labels import Renderer
from veneer.errors import ModelError, shown
from veneer.generation.choice import Forbidden
from veneer.generation.config import SamplingOptions

# The settings that change an answer and are not followed → the value that changes nothing.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
_PENALTY = {"repetition_penalty": 1.0}
_SAMPLING_ELSEWHERE = {"typical_p": 1.0, "top_h": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
_ELSEWHERE = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0, "dola_layers": None,
    "constraints": None, "force_words_ids": None, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "sequence_bias": None, "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "stop_strings": None, "watermarking_config": None, "max_time": None, "token_healing": False,
    "num_return_sequences": 1,
}  # fmt: skip


@dataclass(frozen=True)
class OwnSettings:
    """What is followed, as token ids."""

    ends: frozenset[int]
    forbidden: Forbidden
    start: int | None  # what an encoder-decoder's answer begins after


def own_settings(model: Any, renderer: Renderer) -> OwnSettings:
    """What is followed. Raises ModelError for settings that are no token ids."""
    config = getattr(model, "generation_config", None)
    ends = _ids(config, "eos_token_id")
    bad_words = [tuple(_ids_in(word, "bad_words_ids")) for word in _value(config, "bad_words_ids") or []]
    start = _ids(config, "decoder_start_token_id") or _ids(model.config, "decoder_start_token_id")
    start = start or _ids(config, "bos_token_id")
    given = _ids(config, "forced_bos_token_id")
    forbidden = Forbidden(
        tuple(_ids(config, "suppress_tokens")), tuple(_ids(config, "begin_suppress_tokens")),
        # As in transformers, an end token is no bad word.
        tuple(word for word in bad_words if word and not (len(word) == 1 and word[0] in ends)),
        given[0] if given and renderer.seq2seq else None,
    )  # fmt: skip
    return OwnSettings(
        frozenset([*renderer.ends(), *ends]), forbidden, start[0] if start and renderer.seq2seq else None
    )


def not_followed(model: Any, asked: SamplingOptions) -> str:
    """A sentence that names the settings of generation_config.json that are not followed and change answers; empty
    where there are none. An option that is given stands for the setting of its name."""
    config = getattr(model, "generation_config", None)
    sampled = _value(config, "do_sample") is True
    options = _differing(config, {**(_SAMPLING if sampled else {}), **_PENALTY})
    options = {name: value for name, value in options.items() if name not in asked.model_fields_set}
    if options and sampled and "temperature" not in (options.keys() | asked.model_fields_set):
        options = {"temperature": 1.0, **options}
    other = _differing(config, {**(_SAMPLING_ELSEWHERE if sampled else {}), **_ELSEWHERE})
    if other.get("stop_strings") and "stop" in asked.model_fields_set:
        del other["stop_strings"]
    if not options and not other:
        return ""
    remedy = f"; of these you can give {', '.join(options)} as options" if options else ""
    return f"Veneer does not follow the model's generation_config.json in {_listed({**options, **other})}{remedy}."


def _value(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _differing(config: Any, neutral: dict[str, Any]) -> dict[str, Any]:
    """The settings that are given and change something."""
    values = {name: _value(config, name) for name in neutral}
    return {name: value for name, value in values.items() if value is not None and value != neutral[name]}


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())


def _ids(config: Any, name: str) -> list[int]:
    value = _value(config, name)
    return [] if value is None else _ids_in(value if isinstance(value, list | tuple) else [value], name)


def _ids_in(values: Any, name: str) -> list[int]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ModelError(f"The model's generation_config.json has {name} = {shown(values)}; it takes token ids.")
    return list(values)
