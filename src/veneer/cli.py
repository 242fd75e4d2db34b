"""The ``veneer`` command: one click command a verb. Each loads what it needs when it runs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import click

from veneer import __version__
from veneer.commands import completion as completes
from veneer.commands.config import (
    ExportOptions,
    InspectOptions,
    MergeOptions,
    PushOptions,
    QuantizeOptions,
    WeightedOptions,
)
from veneer.commands.flags import Verb, flags, given
from veneer.data.files import kind_of
from veneer.errors import ConfigError, VeneerError, did_you_mean
from veneer.evaluation.config import EvaluateOptions
from veneer.generation.config import GenerateOptions
from veneer.planning.config import ASKED, PlanOptions
from veneer.prediction.config import PredictOptions
from veneer.reporting.config import ReportOptions
from veneer.studies.config import StudyOptions
from veneer.terminal import harmless, terminal
from veneer.threads import settle
from veneer.training.config import TrainConfig, read_options

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


class _Verbs(click.Group):
    """The verbs in the order in which a person needs them, and the nearest one for a misspelt name."""

    command_class = Verb

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"There is no command {args[0]!r}.{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="veneer")
def cli() -> None:
    """Fine-tune open language models with low-rank updates on the machine you have.

    \b
    veneer train --model smollm2-135m-instruct --data rows.jsonl --output runs/first
    veneer evaluate runs/first
    veneer chat runs/first --both
    """


@cli.command(short_help="Will it fit, how long will it take; what to change if not.")
@click.argument("model", required=False, shell_complete=completes.models)
@click.argument("run_yaml", required=False, metavar="[RUN.yaml]", type=click.Path(path_type=Path))
@flags(PlanOptions, only=ASKED)
@_JSON
def plan(model: str | None, run_yaml: Path | None, as_json: bool, **options: Any) -> None:
    """The memory and the time of a training run over MODEL, on the rows of --data: no weights are read.

    Without rows each is assumed to have --max-length tokens. RUN.yaml and flags are those of train; a flag wins. MODEL
    may be a RUN.yaml, which names its own. Without a MODEL: what Llama's sizes take, with --rank.

    \b
    veneer plan smollm2-135m-instruct --data rows.jsonl --storage nf4 --memory 2GB
    veneer plan path/to/model runs/first/config.yaml
    """

    from veneer.commands.plan import Answer, answer
    from veneer.kernels.heap import own_heap
    from veneer.runs.start_options import with_start_options

    own_heap()  # as train does, whose memory is planned
    if model is None and options["adapter"] is None:
        from veneer.planning.sizes import Sizes, sizes

        others = [f"--{name.replace('_', '-')}" for name in given(options) if name != "rank"]
        if others:
            raise ConfigError(
                f"Without a MODEL, plan prints what Llama's sizes take, to which {', '.join(others)} "
                f"{'does' if len(others) == 1 else 'do'} nothing; name the MODEL that is meant."
            )
        prediction: Answer | Sizes = sizes(PlanOptions(model="", **given(options)).rank)
    else:
        if run_yaml is None and model is not None and model.endswith((".yaml", ".yml")):
            run_yaml, model = Path(model), None
        values = {**(read_options(run_yaml) if run_yaml else {}), **given({"model": model, **options})}
        prediction = answer(PlanOptions(**with_start_options(values, PlanOptions)))
    if as_json:
        _print_json(prediction.as_json())
    else:
        prediction.show(terminal())


@cli.command(short_help="Train an adapter; a run folder comes out.")
@click.argument("run_yaml", required=False, metavar="[RUN.yaml]", type=click.Path(path_type=Path))
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="RUN", shell_complete=completes.folders,
    help="Go on with a run from where it is.",
)  # fmt: skip
@flags(TrainConfig, first=("model", "data", "output", "adapter", "held_out", "method", "storage", "steps", "rank"))
def train(run_yaml: Path | None, resume: Path | None, **options: Any) -> None:
    """Train an adapter for MODEL on the rows of DATA and write it, with checkpoints and metrics, to OUTPUT.

    Options come from flags, from RUN.yaml (the same names, with _ for -), or both; a flag wins.

    \b
    veneer train --model smollm2-135m-instruct --data bbc-topics --steps 100 --output runs/bbc
    veneer train runs/bbc/config.yaml --rank 16 --output runs/bbc-r16
    veneer train --resume runs/bbc
    veneer train --adapter runs/bbc --data more.jsonl --output runs/bbc-more
    """

    from veneer.commands import train as runs
    from veneer.kernels.heap import own_heap
    from veneer.runs.start_options import with_start_options

    own_heap()
    if resume is not None:
        if run_yaml is not None:
            raise ConfigError("Give RUN.yaml or --resume RUN, not both: a resumed run has its own config.yaml.")
        result = runs.resume(resume, **given(options))
    else:
        if run_yaml is not None and kind_of(run_yaml):
            both = f"{options['data']},{run_yaml}" if options["data"] else run_yaml
            raise ConfigError(f"{run_yaml} holds rows, and is no RUN.yaml; give it as rows: --data {both}")
        values = {**(read_options(run_yaml) if run_yaml else {}), **given(options)}
        result = runs.train(config=TrainConfig(**with_start_options(values, TrainConfig)))
    loss = "" if result.loss_after is None else f" Held-out loss {result.loss_before:.3f} → {result.loss_after:.3f}."
    written, folder = result.written, result.folder
    both = " --both" if written.name == "adapter" else ""
    click.echo(f"{written.name.title()} of step {result.best_step or result.steps} written to {written}.{loss}")
    click.echo(f"Next: veneer evaluate {folder}   or   veneer chat {folder}{both}   or   veneer report {folder}")


@cli.command(short_help="Measure base and adapter on held-out rows.")
@click.argument("run", metavar="RUN|ADAPTER", type=click.Path(path_type=Path), shell_complete=completes.folders)
@flags(EvaluateOptions)
@_JSON
def evaluate(run: Path, as_json: bool, **options: Any) -> None:
    """Held-out loss, perplexity and choice accuracy of RUN, base and adapter side by side.

    Choice accuracy is measured where the answers are a few labels, exact match where it is asked for. The result is
    also written to RUN/evaluation.json. An adapter folder alone is measured on the rows of --data.
    """
    from veneer.commands.evaluate import evaluate as measure

    comparison = measure(run, **given(options))
    if comparison.note:
        click.echo(harmless(comparison.note), err=True)
    if as_json:
        _print_json(comparison.as_json())
    else:
        terminal().print(*comparison.tables())


@cli.command(short_help="Answer every row of a file.")
@click.argument("source", metavar="RUN|ADAPTER|MODEL", shell_complete=completes.models)
@click.argument("data", shell_complete=completes.rows)
@flags(PredictOptions, first=("output", "overwrite", "keep", "answer", "labels"))
def predict(source: str, data: str, **options: Any) -> None:
    """Write what a run, an adapter or a model answers to each row of DATA: label and probabilities, or text.

    A row needs a prompt, messages, an instruction or a text, and no answer. DATA is as in train, or - for JSON lines
    from standard input. A prediction that was interrupted goes on when the same command is given again.

    \b
    veneer predict runs/bbc headlines.csv --output topics.csv
    """

    from veneer.commands.predict import predict_lines

    result = predict_lines(source, data, terminal(stderr=True), **given(options))
    if result.output is not None:
        click.echo(f"{len(result):,} {'row' if len(result) == 1 else 'rows'} written to {result.output}.")


@cli.command(short_help="Answer one prompt.")
@click.argument("source", metavar="RUN|ADAPTER|MODEL", shell_complete=completes.models)
@click.argument("prompt")
@flags(GenerateOptions)
@_JSON
def generate(source: str, prompt: str, as_json: bool, **options: Any) -> None:
    """Print what a run, an adapter or a model answers to PROMPT; of a classifier the class and its probability.

    \b
    veneer generate runs/bbc 'Headline: Chip maker doubles its profit\\nTopic:' --both
    """
    from veneer.commands.generate import answers

    said = answers(source, prompt.replace("\\n", "\n"), **given(options))
    if as_json:
        shares = {name: side.probabilities for name, side in said.items() if side.probabilities is not None}
        texts = {name: side.text for name, side in said.items()}
        _print_json({"prompt": prompt, **texts, **({"probabilities": shares} if shares else {})})
    else:
        for name, side in said.items():
            click.echo(harmless(f"{name}: {side}" if len(said) > 1 else str(side)))


@cli.command(short_help="Talk to a run, an adapter or a model.")
@click.argument("source", metavar="RUN|ADAPTER|MODEL", shell_complete=completes.models)
@flags(GenerateOptions)
def chat(source: str, **options: Any) -> None:
    """A conversation in the terminal. An empty line or Ctrl-D ends it; /new starts another one."""
    from veneer.commands.chat import talk

    talk(source, **given(options))


@cli.command(short_help="Fold an adapter into its base: a plain model comes out.")
@click.argument("run", metavar="RUN|ADAPTER", shell_complete=completes.folders)
@click.argument("out", type=click.Path(path_type=Path))
@flags(MergeOptions, first=("format", "storage", "check"))
def merge(run: str, out: Path, **options: Any) -> None:
    """Write base and adapter as one model to OUT, tokenizer included: a transformers folder, a GGUF file (OUT.gguf), or
    a folder for Ollama.

    In nf4 or fp4 a folder is a bitsandbytes checkpoint. Where weights are rounded, the command prints how far that
    moves the model's predictions. A GGUF file can be written of a model without an adapter, too.
    """
    from veneer.commands.merge import merge_to

    asked = MergeOptions(**given(options))
    merged = merge_to(run, out, **asked.model_dump())
    for note in merged.notes:
        click.echo(f"Note: {note}")
    if merged.moved is not None:
        click.echo(merged.moved.sentence(asked.storage))
    click.echo(f"Merged model written to {merged.out}. Next: {merged.next_command}")


@cli.command(short_help="An adapter as a plain LoRA that every loader reads.")
@click.argument("run", metavar="RUN|ADAPTER", type=click.Path(path_type=Path), shell_complete=completes.folders)
@click.argument("out", type=click.Path(path_type=Path))
@flags(ExportOptions)
def export(run: Path, out: Path, **options: Any) -> None:
    """Write an adapter to OUT: a folder with a LoRA of one rank and scale 1, for vLLM and others; GGUF, for llama.cpp
    (OUT.gguf, or a folder with its base); a folder for Ollama; or one for mlx-lm.

    What AdaLoRA's singular values, rank patterns and rsLoRA say is folded into the matrices.
    """
    from veneer.commands.export import export_to

    asked = ExportOptions(**given(options))
    exported = export_to(run, out, **asked.model_dump())
    for note in exported.notes:
        click.echo(f"Note: {note}")
    what = "Plain LoRA" if asked.format == "peft" else "Adapter"
    following = exported.next_command
    click.echo(f"{what} written to {exported.out}.{f' Next: {following}' if following else ''}")


@cli.command(short_help="Several adapters as one: their weighted sum.")
@click.argument(
    "sources", metavar="RUN|ADAPTER…", nargs=-1, required=True, type=click.Path(path_type=Path),
    shell_complete=completes.folders,
)  # fmt: skip
@click.argument("out", type=click.Path(path_type=Path))
@flags(WeightedOptions, first=("weights",))
def combine(sources: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Write several adapters of one base to the folder OUT as one plain LoRA.

    \b
    veneer combine runs/polite runs/brief mixed --weights 0.7,0.3
    """
    from veneer.commands.combine import combine_to

    combine_to(sources, out, **given(options))
    click.echo(f"Combined adapter written to {out}.")


@cli.command(short_help="Upload an adapter to the Hugging Face hub.")
@click.argument(
    "source", metavar="RUN|ADAPTER|MODEL", type=click.Path(path_type=Path), shell_complete=completes.folders
)
@click.argument("repo", metavar="OWNER/NAME")
@flags(PushOptions)
def push(source: Path, repo: str, **options: Any) -> None:
    """Upload the adapter of a run, an adapter's folder or a merged model to a new repository of the hub.

    Each file is listed first. Rows and the state of a training are never uploaded. The token is read from the
    environment, HF_TOKEN.

    \b
    veneer push runs/bbc somebody/bbc-topics --private
    """
    from veneer.commands.push import push as upload

    click.echo(f"Uploaded to {upload(source, repo, **given(options))}")


@cli.command(short_help="Keep a model in 4 bits: a bitsandbytes checkpoint comes out.")
@click.argument("model", shell_complete=completes.models)
@click.argument("out", type=click.Path(path_type=Path))
@flags(QuantizeOptions, first=("storage",))
def quantize(model: str, out: Path, **options: Any) -> None:
    """Write MODEL with its linear layers in 4 bits to the folder OUT, tokenizer included.

    transformers loads the folder where bitsandbytes is installed; Veneer maps it into memory as it is.
    """
    from veneer.commands.quantize import quantise_to

    if left := quantise_to(model, out, **given(options)):
        click.echo(left)
    click.echo(f"Quantised model written to {out}. Next: veneer train --model {out}")


@cli.command(short_help="What is in a model, an adapter, a run, a folder of runs, or rows.")
@click.argument("source", metavar="MODEL|ADAPTER|RUN|FOLDER|DATA", shell_complete=completes.anything)
@flags(InspectOptions)
@_JSON
def inspect(source: str, as_json: bool, **options: Any) -> None:
    """Modules that can be adapted; an adapter's ranks; a run's progress, or that of all runs in a folder; rows, with
    the learned part marked.

    \b
    veneer inspect smollm2-135m-instruct
    veneer inspect runs
    veneer inspect rows.jsonl --model smollm2-135m-instruct
    """
    from veneer.commands.inspect import inspect_source

    inspected = inspect_source(source, InspectOptions(**given(options)))
    if as_json:
        _print_json(inspected.as_json())
    else:
        inspected.show(terminal())


@cli.command(short_help="One self-contained HTML page of a run, of several side by side, or of a study.")
@click.argument(
    "sources", metavar="RUN…|STUDY", nargs=-1, required=True, type=click.Path(path_type=Path),
    shell_complete=completes.folders,
)  # fmt: skip
@flags(ReportOptions)
def report(sources: tuple[Path, ...], **options: Any) -> None:
    """Write what a run was asked for and what it measured, or the findings of a study, as a page to open in a browser.

    The page needs no network and no other file. A run in progress has one, too, of what there is so far. Several runs
    are compared on one page: options that differ, curves together, scores side by side.

    \b
    veneer report runs/first
    veneer report runs/first runs/second --output both.html
    """
    from veneer.commands.report import compare_runs
    from veneer.commands.report import report as write

    asked = ReportOptions(**given(options))
    if len(sources) == 1:
        click.echo(f"Report written to {write(sources[0], asked)}; open it in a browser.")
        return
    from veneer.reporting.compared_page import compared_table

    out, compared = compare_runs(sources, asked)
    terminal().print(compared_table(compared))
    for line in filter(None, [compared.lowest(), *compared.notes()]):
        click.echo(harmless(line))
    click.echo(f"Comparison of {len(sources)} runs written to {out}; open it in a browser.")


@cli.command(short_help="Watch a run in progress.")
@click.argument("run", type=click.Path(path_type=Path), shell_complete=completes.folders)
def watch(run: Path) -> None:
    """Redraw losses, speed, memory and the time left in the terminal, until the run ends or Ctrl-C.

    Start it before the run, if you like. Into a pipe or a file it prints once.
    """
    from veneer.commands.watch import watch as show

    show(run)


@cli.command(short_help="Measure a trade-off: learning rate, rank, matrices, methods, storage, budget or spectrum.")
@click.argument("kind", metavar="KIND", shell_complete=completes.studies)
@flags(StudyOptions, first=("model", "data", "output", "seeds", "steps"))
def study(kind: str, **options: Any) -> None:
    """Train and measure what KIND compares, and write the rows, a plot and the findings to a folder.

    KIND is learning-rate, rank, matrices, methods, storage, budget or spectrum. A run that has its row is not repeated.

    \b
    veneer study rank --data rows.jsonl --seeds 0,1,2 --steps 200
    """
    from veneer.studies.run import run_study

    run_study(kind, StudyOptions(**given(options)), lambda line: click.echo(harmless(line)))


@cli.command(short_help="Shell completion for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, flags and their values: files, models, methods, storages and the like.

    \b
    veneer completion bash >> ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click brings these three
    click.echo(kind(cli, {}, "veneer", "_VENEER_COMPLETE").source())


def main() -> None:
    """Run the command. A user's mistake is one sentence and exit code 1 (2 for the command line itself)."""
    settle()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of few letters gets the others written out
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="veneer", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except VeneerError as error:
        click.echo(f"Error: {harmless(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a file that may not be read: what the system says of it
        where = error.filename2 or error.filename
        click.echo(harmless(f"Error: {f'{where}: ' if where else ''}{error.strerror or error}"), err=True)
        sys.exit(1)


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))
