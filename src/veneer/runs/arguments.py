"""The options that public functions take by name, as type checkers read them. No torch here.

Written by tests/arguments_file.py from the option classes, where each option is declared; do not edit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict


class Needed(TypedDict):
    """What every run needs."""

    data: Any
    """Rows: .jsonl, .json, .csv, .tsv, .parquet, .txt, a folder of such files, a name of datasets
    (name:config:split), or bbc-topics; several with commas, b.jsonl=2 for twice as often."""
    output: str | Path
    """Run folder to make: adapter, checkpoints, metrics."""


class TrainArguments(Needed, total=False):
    """The options of `veneer.train`."""

    columns: dict[str, str]
    """Columns that have other names: prompt=question,completion=answer; answers.text.0 is inside one, title+body
    are two."""
    shape: Literal[
        "auto",
        "messages",
        "prompt/completion",
        "instruction/output",
        "text/label",
        "text/labels",
        "text/number",
        "chosen/rejected",
        "prompt/completion/label",
        "text",
    ]
    """Shape of the rows; auto: by their columns."""
    bad_rows: Literal["stop", "leave-out"]
    """A row that cannot be used is an error, or is left out and counted."""
    block_size: int
    """Weights of a quantised storage that share a scale: 32, 64, … 4096."""
    double_quantisation: bool
    """Keep the scales of a quantised storage in 8 bits, too."""
    device: str
    """cpu, cuda, cuda:N, mps or xpu; auto: a GPU that holds what is asked, by the plan, else the CPU."""
    dense_storage: Literal["fp32", "bf16", "fp16"]
    """How embeddings and head are kept beside a storage of codes (nf4, fp4, int4, int8). bf16 halves their
    memory."""
    compute: Literal["auto", "fp32", "bf16"]
    """The type of activations and products, whatever the storage; auto: bf16 where a step was measured to be
    clearly faster in it on this machine, else fp32."""
    initial_rank: int | None
    """AdaLoRA: rank of every matrix at the start. Default: 1.5 times the target."""
    target_rank: float
    """AdaLoRA: mean rank of the matrices at the end."""
    budget: float | str | None
    """AdaLoRA: the end in other words than target_rank: parameters of the update (0.3M), or their share of the
    model's (0.1%)."""
    tinit: float
    """AdaLoRA: steps before ranks are taken: a share of all below 1, else a number."""
    tfinal: float
    """AdaLoRA: steps after the ranks are fixed: a share of all below 1, else a number."""
    delta_t: int
    """AdaLoRA: steps between two allocations of the budget."""
    beta1: float
    """AdaLoRA: smoothing of the sensitivity."""
    beta2: float
    """AdaLoRA: smoothing of the uncertainty."""
    orthogonality: float
    """AdaLoRA: weight of the pull of P and Q towards orthogonality."""
    orthogonality_form: Literal["squared", "mean-norm"]
    """AdaLoRA: the sum of squared norms, as in the paper, or the mean of norms, as in peft."""
    sensitivity: Literal["before", "after"]
    """AdaLoRA: the gradient is multiplied by the weights of before the optimizer's step, as in the paper, or of
    after it, as in peft."""
    alpha: float | None
    """Scale of the update: alpha / rank multiplies it. Default: twice the rank (AdaLoRA: the initial rank)."""
    dropout: float
    """Share of the update's inputs that are dropped while training."""
    targets: str | list[str]
    """Modules to adapt: 'all-linear' (every linear layer but the output head), names matched by their ending
    (q_proj,v_proj), or one regular expression over whole module names."""
    exclude: str | list[str]
    """Modules not to adapt, among those that targets choose; names by ending or one regex."""
    layers: int | list[int]
    """Adapt only these layers (block numbers from 0). Default: all."""
    layers_pattern: str | list[str]
    """Lists whose numbers layers counts, where a name has several (blocks, of stages.0.blocks.1.fc). Default: the
    first number of a name."""
    train_also: str | list[str]
    """Modules trained whole beside the update, by their name's ending (a new head, say)."""
    new_tokens: int | list[int]
    """Token ids whose embedding rows are trained while the rest of the vocabulary stays frozen."""
    rank: int
    """Rank of the update; r(in + out) parameters for each adapted matrix."""
    rank_pattern: dict[str, int]
    """Other ranks for some modules: a name's ending, or a regex for it → rank."""
    alpha_pattern: dict[str, float]
    """Other alphas for some modules: a name's ending, or a regex for it → alpha."""
    target_parameters: str | list[str]
    """Parameters of a mixture's experts to adapt beside the targets, by their name's ending
    (experts.gate_up_proj). Targets that match no module find these, too."""
    rslora: bool
    """Scale by alpha / √rank instead of alpha / rank."""
    dora: bool
    """DoRA: a magnitude for each output of an adapted module is trained beside A and B, which change its
    direction."""
    init: Literal["kaiming", "gaussian", "loftq", "pissa"]
    """How A starts, B being zero: Kaiming-uniform, as most libraries do, or the paper's Gaussian. Or A and B
    start from what quantising the base lost (loftq), or as the weight's largest directions (pissa)."""
    loftq_iterations: int
    """Iterations of init loftq; from the second on the base's codes change, and are saved, too."""
    adapter: str | None
    """Run or adapter folder to start from; model, method and the update's options are those of it."""
    held_out: float | str | Path
    """Rows kept from training to measure on: a share, a number of rows, or a file. 0: none; auto: those of a
    folder's validation files or a data set's validation split, else a share of 0.1."""
    method: Literal["lora", "adalora", "full", "bias", "head"]
    """What is trained: an update of one rank for all, or of ranks given out by importance; or the model's own
    weights: all, its biases, or its head."""
    storage: Literal["fp32", "bf16", "fp16", "nf4", "fp4", "int4", "int8"]
    """How the frozen base is kept."""
    task: Literal["auto", "causal", "seq2seq", "classification", "multi-label", "regression"]
    """What the model is trained to do: to write text, or, with a head, to choose a class, all labels of a text,
    or a number. auto asks its checkpoint, and of lists of labels makes multi-label."""
    template: str
    """Chat template for conversations only (auto, plain), or for prompt and completion too (chat); or another one
    than the tokenizer's: alpaca, chatml, or a file."""
    template_arguments: dict[str, Any]
    """What the chat template is given: enable_thinking=false."""
    fold_turns: bool
    """Put the system message into the first user turn and join successive turns of one role, for templates that
    take neither (Gemma, Mistral)."""
    learn: Literal["answer", "last", "all"]
    """Tokens that are learned: of every answer, of a conversation's last answer, or all."""
    system: str | None
    """System message of conversations that have none, in training and in use."""
    objective: Literal["auto", "likelihood", "dpo", "orpo", "kto"]
    """What is made better: the likelihood of answers; chosen answers against rejected ones (dpo, orpo); or good
    answers against bad ones (kto). auto: dpo or kto for rows with such answers, else likelihood."""
    beta: float
    """How strongly dpo and kto are held to the model as it was; in orpo the weight of the odds ratio, the paper's
    λ."""
    desirable_weight: float
    """Weight of good answers in kto."""
    undesirable_weight: float
    """Weight of bad answers in kto."""
    max_length: int
    """Most tokens of a row; see long_rows."""
    long_rows: Literal["auto", "cut", "cut-front", "split", "drop"]
    """Longer rows: cut (at the end), cut-front, drop, or split, plain text into pieces; auto: plain text is
    split, others are cut."""
    steps: int | None
    """Optimizer steps. Default: as many as the epochs take."""
    epochs: float | Literal["auto"]
    """Times through the rows, when steps is not given; auto: once, and more often through few rows."""
    batch_size: int
    """Rows in an optimizer step."""
    micro_batch_size: int | None
    """Rows in one pass, to save memory; does not change the result. Default: batch_size."""
    learning_rate: float | Literal["auto"]
    """Highest learning rate of AdamW; auto: by the method and the model's width."""
    schedule: Literal["constant", "linear", "cosine"]
    """Learning rate after warm-up."""
    warmup: float
    """Steps of warm-up: a share of all below 1, else a number."""
    weight_decay: float
    """Decoupled weight decay of AdamW."""
    lora_plus: float
    """LoRA+: how many times the learning rate B has, and A has it once; the paper has 16 with a lower learning
    rate. 1: both the same."""
    optimizer: Literal["adamw", "paged-adamw"]
    """AdamW, or the same with its states in a file of which a part is in memory."""
    optimizer_memory: int | str
    """States of paged-adamw in memory at a time; does not change the result."""
    optimizer_bits: Literal[32, 8]
    """Bits of each state of paged-adamw; 8 takes a quarter of the room and changes the result a bit."""
    label_smoothing: float
    """Share of each target that is spread over the vocabulary, or the classes."""
    class_weights: Literal["none", "balanced"] | dict[str, float]
    """Weight of each class in a classifier's loss, spam=4,ham=1 (others 1); balanced: rows / (classes × rows of
    the class), as in scikit-learn. With several labels a row, of each label in the rows that have it; balanced:
    rows without / rows with it, as torch advises for pos_weight."""
    neftune: float
    """NEFTune: noise on the embeddings while training, of ± this / √(tokens of the row × width); the paper has 5
    to 15. 0: none."""
    clip: float
    """Largest norm of the gradient; 0 does not clip."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third slower."""
    memory: int | str | None
    """Memory that the run may take (24GB): as few layers are recomputed as fit it. Default: what the machine has
    available."""
    check_memory: bool
    """Refuse a run that clearly cannot fit the memory, before it starts."""
    evaluate_every: int | Literal["auto"]
    """Steps between held-out evaluations; 0: at the end only; auto: 50, or an epoch of few rows, or more where
    many rows are held out."""
    metrics: str | list[str]
    """Also measured of answers to held-out rows, at most 64: exact, rouge-1, rouge-2, rouge-l, bleu, or functions
    of your own, package.module:function."""
    best_by: str
    """What decides which adapter is kept, and patience: the held-out loss, accuracy (of labels), or a metric."""
    patience: int | Literal["auto"]
    """Stop after this many evaluations in a row that are not better, in held-out loss or what best_by says; 0:
    never; auto: 2 where auto chose several epochs, else never."""
    checkpoint_every: int
    """Steps between checkpoints, from which a run resumes."""
    keep_checkpoints: int
    """Latest checkpoints that are kept."""
    log_to: Literal["mlflow", "wandb"] | list[Literal["mlflow", "wandb"]]
    """Also log to these: mlflow, wandb; each an extra to install (veneer[wandb])."""
    seed: int
    """Seed of the split, the order of rows, the initial values and dropout."""


class ResumeArguments(TypedDict, total=False):
    """The options of `veneer.resume`."""

    steps: int | None
    """Optimizer steps. Default: as many as the epochs take."""
    epochs: float | Literal["auto"]
    """Times through the rows, when steps is not given; auto: once, and more often through few rows."""
    learning_rate: float | Literal["auto"]
    """Highest learning rate of AdamW; auto: by the method and the model's width."""
    schedule: Literal["constant", "linear", "cosine"]
    """Learning rate after warm-up."""
    warmup: float
    """Steps of warm-up: a share of all below 1, else a number."""
    weight_decay: float
    """Decoupled weight decay of AdamW."""
    clip: float
    """Largest norm of the gradient; 0 does not clip."""
    micro_batch_size: int | None
    """Rows in one pass, to save memory; does not change the result. Default: batch_size."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third slower."""
    evaluate_every: int | Literal["auto"]
    """Steps between held-out evaluations; 0: at the end only; auto: 50, or an epoch of few rows, or more where
    many rows are held out."""
    patience: int | Literal["auto"]
    """Stop after this many evaluations in a row that are not better, in held-out loss or what best_by says; 0:
    never; auto: 2 where auto chose several epochs, else never."""
    checkpoint_every: int
    """Steps between checkpoints, from which a run resumes."""
    keep_checkpoints: int
    """Latest checkpoints that are kept."""
    optimizer: Literal["adamw", "paged-adamw"]
    """AdamW, or the same with its states in a file of which a part is in memory."""
    optimizer_memory: int | str
    """States of paged-adamw in memory at a time; does not change the result."""
    memory: int | str | None
    """Memory that the run may take (24GB): as few layers are recomputed as fit it. Default: what the machine has
    available."""
    check_memory: bool
    """Refuse a run that clearly cannot fit the memory, before it starts."""
    device: str
    """cpu, cuda, cuda:N, mps or xpu; auto: a GPU that holds what is asked, by the plan, else the CPU."""


class EvaluateArguments(TypedDict, total=False):
    """The options of `veneer.evaluate`."""

    columns: dict[str, str]
    """Columns that have other names: prompt=question,completion=answer; answers.text.0 is inside one, title+body
    are two."""
    shape: Literal[
        "auto",
        "messages",
        "prompt/completion",
        "instruction/output",
        "text/label",
        "text/labels",
        "text/number",
        "chosen/rejected",
        "prompt/completion/label",
        "text",
    ]
    """Shape of the rows; auto: by their columns."""
    bad_rows: Literal["stop", "leave-out"]
    """A row that cannot be used is an error, or is left out and counted."""
    device: str
    """cpu, cuda, cuda:N, mps or xpu; auto: a GPU that holds what is asked, by the plan, else the CPU."""
    compute: Literal["auto", "fp32", "bf16"]
    """The type of activations and products; auto: that of the run, or of a model whichever is faster on this
    machine."""
    data: Any
    """Other rows to measure on. Default: the run's held-out rows."""
    exact_match: bool
    """Also generate an answer to each row, by base and adapter, and compare it with the right one, letter by
    letter; slow."""
    metrics: str | list[str]
    """Also generate an answer to each row and measure it: exact, rouge-1, rouge-2, rouge-l, bleu, or functions of
    your own, package.module:function; slow."""
    batch_size: int
    """Rows in one pass."""
    examples: int
    """Keep what base and adapter answer to this many of the rows; 0: none."""


class PredictArguments(TypedDict, total=False):
    """The options of `veneer.predict`."""

    columns: dict[str, str]
    """Columns that have other names: prompt=question,completion=answer; answers.text.0 is inside one, title+body
    are two."""
    shape: Literal[
        "auto",
        "messages",
        "prompt/completion",
        "instruction/output",
        "text/label",
        "text/labels",
        "text/number",
        "chosen/rejected",
        "prompt/completion/label",
        "text",
    ]
    """Shape of the rows; auto: by their columns."""
    bad_rows: Literal["stop", "leave-out"]
    """A row that cannot be used is an error, or is left out and counted."""
    device: str
    """cpu, cuda, cuda:N, mps or xpu; auto: a GPU that holds what is asked, by the plan, else the CPU."""
    compute: Literal["auto", "fp32", "bf16"]
    """The type of activations and products; auto: that of the run, or of a model whichever is faster on this
    machine."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    temperature: float
    """0 is greedy; higher is more varied."""
    top_p: float
    """Sample among the likeliest tokens that make up this share; 1: among all."""
    top_k: int
    """Sample among this many of the likeliest tokens; 0: among all."""
    min_p: float
    """Sample among tokens with at least this share of the likeliest one's probability; 0: among all."""
    repetition_penalty: float
    """Above 1 tokens of the prompt and of the answer so far become less likely; 1: no penalty."""
    stop: str | list[str]
    """Texts that end an answer, which does not include them. A special token counts, too."""
    seed: int
    """Seed of sampling, for each prompt its own generator of this seed."""
    output: str | Path
    """File to write, in the rows' order: .jsonl, .csv or .parquet. Default: JSON lines on the terminal, or in
    Python no file."""
    overwrite: bool
    """Replace an output that exists."""
    keep: str | list[str] | None
    """Columns of the rows that the output has, too; none for none. Default: all."""
    answer: Literal["auto", "label", "text"]
    """The likeliest label and each label's probability, or generated text; auto: labels where the model is a
    classifier, where the run was trained on a few, or where labels gives some."""
    labels: str | list[str]
    """Labels for a model that generates text. Default: those of the run's rows, if few."""
    template: Literal["auto", "chat", "plain"] | None
    """Chat template for conversations only (auto), or for prompts, too. Default: the run's."""
    system: str | None
    """System message of rows that have none, in the chat template. Default: the run's; an empty one is none."""
    max_length: int | None
    """Tokens of a prompt: the end of a longer one is kept, a classifier's beginning. Default: the run's, without
    a run what the model can take."""
    batch_tokens: int
    """Tokens in one pass, and at most; fewer where memory is short."""


class PlanArguments(TypedDict, total=False):
    """The options of `veneer.plan`."""

    columns: dict[str, str]
    """Columns that have other names: prompt=question,completion=answer; answers.text.0 is inside one, title+body
    are two."""
    shape: Literal[
        "auto",
        "messages",
        "prompt/completion",
        "instruction/output",
        "text/label",
        "text/labels",
        "text/number",
        "chosen/rejected",
        "prompt/completion/label",
        "text",
    ]
    """Shape of the rows; auto: by their columns."""
    bad_rows: Literal["stop", "leave-out"]
    """A row that cannot be used is an error, or is left out and counted."""
    block_size: int
    """Weights of a quantised storage that share a scale: 32, 64, … 4096."""
    double_quantisation: bool
    """Keep the scales of a quantised storage in 8 bits, too."""
    device: str
    """cpu, cuda, cuda:N, mps or xpu; auto: a GPU that holds what is asked, by the plan, else the CPU."""
    dense_storage: Literal["fp32", "bf16", "fp16"]
    """How embeddings and head are kept beside a storage of codes (nf4, fp4, int4, int8). bf16 halves their
    memory."""
    compute: Literal["auto", "fp32", "bf16"]
    """The type of activations and products, whatever the storage; auto: bf16 where a step was measured to be
    clearly faster in it on this machine, else fp32."""
    initial_rank: int | None
    """AdaLoRA: rank of every matrix at the start. Default: 1.5 times the target."""
    target_rank: float
    """AdaLoRA: mean rank of the matrices at the end."""
    budget: float | str | None
    """AdaLoRA: the end in other words than target_rank: parameters of the update (0.3M), or their share of the
    model's (0.1%)."""
    tinit: float
    """AdaLoRA: steps before ranks are taken: a share of all below 1, else a number."""
    tfinal: float
    """AdaLoRA: steps after the ranks are fixed: a share of all below 1, else a number."""
    delta_t: int
    """AdaLoRA: steps between two allocations of the budget."""
    beta1: float
    """AdaLoRA: smoothing of the sensitivity."""
    beta2: float
    """AdaLoRA: smoothing of the uncertainty."""
    orthogonality: float
    """AdaLoRA: weight of the pull of P and Q towards orthogonality."""
    orthogonality_form: Literal["squared", "mean-norm"]
    """AdaLoRA: the sum of squared norms, as in the paper, or the mean of norms, as in peft."""
    sensitivity: Literal["before", "after"]
    """AdaLoRA: the gradient is multiplied by the weights of before the optimizer's step, as in the paper, or of
    after it, as in peft."""
    alpha: float | None
    """Scale of the update: alpha / rank multiplies it. Default: twice the rank (AdaLoRA: the initial rank)."""
    dropout: float
    """Share of the update's inputs that are dropped while training."""
    targets: str | list[str]
    """Modules to adapt: 'all-linear' (every linear layer but the output head), names matched by their ending
    (q_proj,v_proj), or one regular expression over whole module names."""
    exclude: str | list[str]
    """Modules not to adapt, among those that targets choose; names by ending or one regex."""
    layers: int | list[int]
    """Adapt only these layers (block numbers from 0). Default: all."""
    layers_pattern: str | list[str]
    """Lists whose numbers layers counts, where a name has several (blocks, of stages.0.blocks.1.fc). Default: the
    first number of a name."""
    train_also: str | list[str]
    """Modules trained whole beside the update, by their name's ending (a new head, say)."""
    new_tokens: int | list[int]
    """Token ids whose embedding rows are trained while the rest of the vocabulary stays frozen."""
    rank: int
    """Rank of the update; r(in + out) parameters for each adapted matrix."""
    rank_pattern: dict[str, int]
    """Other ranks for some modules: a name's ending, or a regex for it → rank."""
    alpha_pattern: dict[str, float]
    """Other alphas for some modules: a name's ending, or a regex for it → alpha."""
    target_parameters: str | list[str]
    """Parameters of a mixture's experts to adapt beside the targets, by their name's ending
    (experts.gate_up_proj). Targets that match no module find these, too."""
    rslora: bool
    """Scale by alpha / √rank instead of alpha / rank."""
    dora: bool
    """DoRA: a magnitude for each output of an adapted module is trained beside A and B, which change its
    direction."""
    init: Literal["kaiming", "gaussian", "loftq", "pissa"]
    """How A starts, B being zero: Kaiming-uniform, as most libraries do, or the paper's Gaussian. Or A and B
    start from what quantising the base lost (loftq), or as the weight's largest directions (pissa)."""
    loftq_iterations: int
    """Iterations of init loftq; from the second on the base's codes change, and are saved, too."""
    data: Any
    """Rows, as train takes them. Default: each row is assumed to have max_length tokens."""
    adapter: str | None
    """Run or adapter folder to start from; model, method and the update's options are those of it."""
    held_out: float | str | Path
    """Rows kept from training to measure on: a share, a number of rows, or a file. 0: none; auto: those of a
    folder's validation files or a data set's validation split, else a share of 0.1."""
    method: Literal["lora", "adalora", "full", "bias", "head"]
    """What is trained: an update of one rank for all, or of ranks given out by importance; or the model's own
    weights: all, its biases, or its head."""
    storage: Literal["fp32", "bf16", "fp16", "nf4", "fp4", "int4", "int8"]
    """How the frozen base is kept."""
    task: Literal["auto", "causal", "seq2seq", "classification", "multi-label", "regression"]
    """What the model is trained to do: to write text, or, with a head, to choose a class, all labels of a text,
    or a number. auto asks its checkpoint, and of lists of labels makes multi-label."""
    template: str
    """Chat template for conversations only (auto, plain), or for prompt and completion too (chat); or another one
    than the tokenizer's: alpaca, chatml, or a file."""
    template_arguments: dict[str, Any]
    """What the chat template is given: enable_thinking=false."""
    fold_turns: bool
    """Put the system message into the first user turn and join successive turns of one role, for templates that
    take neither (Gemma, Mistral)."""
    learn: Literal["answer", "last", "all"]
    """Tokens that are learned: of every answer, of a conversation's last answer, or all."""
    system: str | None
    """System message of conversations that have none, in training and in use."""
    objective: Literal["auto", "likelihood", "dpo", "orpo", "kto"]
    """What is made better: the likelihood of answers; chosen answers against rejected ones (dpo, orpo); or good
    answers against bad ones (kto). auto: dpo or kto for rows with such answers, else likelihood."""
    beta: float
    """How strongly dpo and kto are held to the model as it was; in orpo the weight of the odds ratio, the paper's
    λ."""
    desirable_weight: float
    """Weight of good answers in kto."""
    undesirable_weight: float
    """Weight of bad answers in kto."""
    max_length: int
    """Most tokens of a row; see long_rows."""
    long_rows: Literal["auto", "cut", "cut-front", "split", "drop"]
    """Longer rows: cut (at the end), cut-front, drop, or split, plain text into pieces; auto: plain text is
    split, others are cut."""
    steps: int | None
    """Optimizer steps. Default: as many as the epochs take."""
    epochs: float | Literal["auto"]
    """Times through the rows, when steps is not given; auto: once, and more often through few rows."""
    batch_size: int
    """Rows in an optimizer step."""
    micro_batch_size: int | None
    """Rows in one pass, to save memory; does not change the result. Default: batch_size."""
    learning_rate: float | Literal["auto"]
    """Highest learning rate of AdamW; auto: by the method and the model's width."""
    schedule: Literal["constant", "linear", "cosine"]
    """Learning rate after warm-up."""
    warmup: float
    """Steps of warm-up: a share of all below 1, else a number."""
    weight_decay: float
    """Decoupled weight decay of AdamW."""
    lora_plus: float
    """LoRA+: how many times the learning rate B has, and A has it once; the paper has 16 with a lower learning
    rate. 1: both the same."""
    optimizer: Literal["adamw", "paged-adamw"]
    """AdamW, or the same with its states in a file of which a part is in memory."""
    optimizer_memory: int | str
    """States of paged-adamw in memory at a time; does not change the result."""
    optimizer_bits: Literal[32, 8]
    """Bits of each state of paged-adamw; 8 takes a quarter of the room and changes the result a bit."""
    label_smoothing: float
    """Share of each target that is spread over the vocabulary, or the classes."""
    class_weights: Literal["none", "balanced"] | dict[str, float]
    """Weight of each class in a classifier's loss, spam=4,ham=1 (others 1); balanced: rows / (classes × rows of
    the class), as in scikit-learn. With several labels a row, of each label in the rows that have it; balanced:
    rows without / rows with it, as torch advises for pos_weight."""
    neftune: float
    """NEFTune: noise on the embeddings while training, of ± this / √(tokens of the row × width); the paper has 5
    to 15. 0: none."""
    clip: float
    """Largest norm of the gradient; 0 does not clip."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third slower."""
    memory: int | str | None
    """Memory that the run may take (24GB): as few layers are recomputed as fit it. Default: what the machine has
    available."""
    check_memory: bool
    """Refuse a run that clearly cannot fit the memory, before it starts."""
    evaluate_every: int | Literal["auto"]
    """Steps between held-out evaluations; 0: at the end only; auto: 50, or an epoch of few rows, or more where
    many rows are held out."""
    metrics: str | list[str]
    """Also measured of answers to held-out rows, at most 64: exact, rouge-1, rouge-2, rouge-l, bleu, or functions
    of your own, package.module:function."""
    best_by: str
    """What decides which adapter is kept, and patience: the held-out loss, accuracy (of labels), or a metric."""
    patience: int | Literal["auto"]
    """Stop after this many evaluations in a row that are not better, in held-out loss or what best_by says; 0:
    never; auto: 2 where auto chose several epochs, else never."""
    checkpoint_every: int
    """Steps between checkpoints, from which a run resumes."""
    keep_checkpoints: int
    """Latest checkpoints that are kept."""
    log_to: Literal["mlflow", "wandb"] | list[Literal["mlflow", "wandb"]]
    """Also log to these: mlflow, wandb; each an extra to install (veneer[wandb])."""
    seed: int
    """Seed of the split, the order of rows, the initial values and dropout."""
    measure: bool
    """Measure this machine's rates again."""
