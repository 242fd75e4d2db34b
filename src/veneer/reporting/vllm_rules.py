"""What vLLM's own checks let an adapter be, so that the commands for this very adapter do not end in one of them.

Read in its public source (vllm/lora/peft_helper.py, utils.py, lora_model.py, vllm/config/lora.py) and in the table of
its documentation's page of supported models, November 2026; vLLM itself is not run. ``modules_to_save``, rows of
tokens, DoRA, and biases it refuses of every model: see `LoadedBy.beside`. rsLoRA and patterns of ranks and alphas it
reads or not by its version, so that these are exported as a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes in every version; the newest take 1, too

# transformers' classes that it serves, and whose table has no mark under LoRA.
WITHOUT_ADAPTERS = frozenset({
    "BloomForCausalLM", "DbrxForCausalLM", "DeepseekV4ForCausalLM", "ExaoneMoeForCausalLM", "FalconForCausalLM",
    "FalconMambaForCausalLM", "FlexOlmoForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM",
    "Gemma3nForCausalLM", "HrmTextForCausalLM", "Jais2ForCausalLM", "KimiLinearForCausalLM", "Mamba2ForCausalLM",
    "MambaForCausalLM", "MellumForCausalLM", "MiMoV2FlashForCausalLM", "MptForCausalLM", "OlmoeForCausalLM",
    "StableLmForCausalLM", "Zamba2ForCausalLM",
})  # fmt: skip
# Its names of what it adapts are those of its linear layers, and of embedding and head where a class has listed them.
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wpe", "wte"})
WITH_EMBEDDINGS = frozenset({"LlamaForCausalLM", "MistralForCausalLM"})  # in every version; of others in some


def why_merged(ranks: Mapping[str, int], family: str) -> str:
    """Why vLLM cannot take an adapter of low-rank updates, as a sentence; nothing where it can.

    ``ranks``: module → rank; ``family``: transformers' class of the base, where it is known.
    """
    if family in WITHOUT_ADAPTERS:
        return f"vLLM takes no adapters of {family}, so this one is merged first."
    embeddings = sorted({name.rpartition(".")[2] for name in ranks} & _EMBEDDINGS)
    if embeddings and family not in WITH_EMBEDDINGS:
        of_it = family or "some models"
        return (
            f"Not every vLLM takes an update of {' and '.join(embeddings)} of {of_it}, so the adapter is merged first."
        )
    largest = max(ranks.values(), default=0)
    if largest > MAX_RANKS[-1]:
        return f"vLLM takes ranks up to {MAX_RANKS[-1]}, and this is {largest}, so the adapter is merged first."
    return ""


def max_rank(ranks: Mapping[str, int]) -> int:
    """What --max-lora-rank is to be for an adapter that vLLM takes."""
    largest = max(ranks.values(), default=0)
    return next(rank for rank in MAX_RANKS if rank >= largest)
