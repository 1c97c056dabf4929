"""The command line: `eejax generate`, `info`, `demo`, `tune-exits`, `train-length`, `calibrate`.

Flags carry the names of the fields they set. jax is imported inside the commands, so that `--help` and a mistyped flag
answer at once.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from eejax.cli.calibrate import calibrate
from eejax.cli.terminal import answer_one_by_one, answer_together, integers, numbers, reported_errors, status, summary
from eejax.cli.train_length import train_length
from eejax.cli.tune_exits import tune_exits
from eejax.core import (
    CALIBRATED,
    ConfigError,
    DecayingThreshold,
    EarlyExitParams,
    PromptLike,
    SamplingParams,
)
from eejax.text import prompt_ids, read_prompts

if TYPE_CHECKING:
    from eejax.serve import LLM

app = typer.Typer(
    help="Inference for early-exit language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO_THRESHOLD = "0.5"
"""A small model is seldom sure: at 0.9 the demo's tokens would hardly ever leave early."""
EXITS, SAMPLING, ENGINE = "Early exit", "Sampling", "Engine"

CheckpointPath = Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint folder.", show_default=False)]
Threshold = Annotated[
    str | None,
    typer.Option(
        metavar="T[,T]",
        help="Confidence at which a token leaves: one, or one per exit. Above 1 is full depth; calibrated is what "
        "eejax calibrate certified.  [default: 0.9]",
        rich_help_panel=EXITS,
    ),
]
Measure = Annotated[
    str | None,
    typer.Option(
        help="softmax, margin, similarity or classifier.  [default: softmax]", metavar="NAME", rich_help_panel=EXITS
    ),
]
MinLayers = Annotated[
    int | None, typer.Option(help="Blocks that every token runs at least.", rich_help_panel=EXITS, show_default=False)
]
ExitLayers = Annotated[
    str | None,
    typer.Option(metavar="E[,E]", help="Exits to use instead of the checkpoint's own.", rich_help_panel=EXITS),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="float32, bfloat16 or float16; by default as suits the device.", rich_help_panel=ENGINE
    ),
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together.", rich_help_panel=ENGINE, show_default=False)
]


def main() -> None:
    """Console entry point."""
    app()


@app.command()
def generate(
    path: CheckpointPath,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts; stdin is one prompt where none is given.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help='Prompts, one a line; in a .jsonl file, objects with a "prompt".')
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as they are, as for a checkpoint that has no chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print answers while they are made.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with exit layers.")] = False,
    threshold: Threshold = None,
    measure: Measure = None,
    tau: Annotated[
        float | None,
        typer.Option(
            help="Let the threshold decay along the answer (CALM).", rich_help_panel=EXITS, show_default=False
        ),
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(help="Ask an exit's head only if its probe says this.", rich_help_panel=EXITS, show_default=False),
    ] = None,
    min_layers: MinLayers = None,
    exit_layers: ExitLayers = None,
    full_depth: Annotated[
        bool, typer.Option("--full-depth", help="Run every block for every token.", rich_help_panel=EXITS)
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Answer tokens at the most.", rich_help_panel=SAMPLING)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 keeps all tokens.", rich_help_panel=SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.", rich_help_panel=SAMPLING)] = 0,
    min_p: Annotated[float, typer.Option(help="0 keeps all tokens.", rich_help_panel=SAMPLING)] = 0.0,
    n: Annotated[int, typer.Option("--n", "-n", help="Answers to each prompt.", rich_help_panel=SAMPLING)] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends the answer; may be repeated.", rich_help_panel=SAMPLING)
    ] = None,
    stop_token_ids: Annotated[
        str | None, typer.Option(metavar="ID[,ID]", help="Tokens that end the answer.", rich_help_panel=SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end token.", rich_help_panel=SAMPLING)
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.", rich_help_panel=SAMPLING)] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log-probabilities of so many likeliest tokens.", rich_help_panel=SAMPLING),
    ] = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences decoded together.", rich_help_panel=ENGINE)] = 32,
    num_pages: Annotated[
        int | None, typer.Option(help="Pages of the KV cache.", rich_help_panel=ENGINE, show_default=False)
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens in a page.", rich_help_panel=ENGINE)] = 64,
    scheduler: Annotated[
        str, typer.Option(help="fcfs, length or static.", metavar="POLICY", rich_help_panel=ENGINE)
    ] = "fcfs",
    compaction: Annotated[
        str,
        typer.Option(
            help="auto, always or never: unresolved rows go on by themselves.", metavar="WHEN", rich_help_panel=ENGINE
        ),
    ] = "auto",
    fill: Annotated[
        str,
        typer.Option(
            help="auto, eager or deferred: when blocks that were not run get their K and V.",
            metavar="WHEN",
            rich_help_panel=ENGINE,
        ),
    ] = "auto",
    rebatching: Annotated[
        str,
        typer.Option(
            help="auto, always or never: rows that go deep are gathered while others go on.",
            metavar="WHEN",
            rich_help_panel=ENGINE,
        ),
    ] = "auto",
) -> None:
    """Answer prompts."""
    with reported_errors():
        params = SamplingParams(
            n=n,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            stop_token_ids=integers("--stop-token-ids", stop_token_ids) or (),
            ignore_eos=ignore_eos,
            seed=seed,
            logprobs=logprobs,
            early_exit=early_exit_params(full_depth, threshold, measure, tau, min_layers, gate),
        )
        if stream and n != 1:
            raise ConfigError(f"--stream shows one answer to each prompt, so --n must be 1, got {n}")
        if logprobs is not None and (stream or not as_json):
            raise ConfigError("--logprobs is reported with --json and without --stream")
        texts = prompts_from(prompt or [], file)
        llm = load(
            path,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            num_pages=num_pages,
            page_size=page_size,
            exit_layers=integers("--exit-layers", exit_layers),
            scheduler=scheduler,
            compaction=compaction,
            fill=fill,
            rebatching=rebatching,
        )
        if params.early_exit is not None:
            check_exits(llm, params.early_exit)
        prompts: list[PromptLike] = [*texts] if raw else in_chat_template(llm, texts)
        answer = answer_one_by_one if stream else answer_together
        if not answer(llm, texts, prompts, params, as_json):
            raise typer.Exit(2)


@app.command()
def info(
    path: CheckpointPath,
    dtype: Dtype = None,
    page_size: Annotated[int, typer.Option(help="Tokens in a page.", rich_help_panel=ENGINE)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a checkpoint holds and what serving it takes."""
    with reported_errors():
        from eejax.cli.info import describe, print_description

        found = describe(path, dtype, page_size)
        if as_json:
            print(json.dumps(found))
        else:
            print_description(found)


@app.command()
def demo(
    path: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint folder; the repository's demo model by default.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Other prompts, as for generate.")] = None,
    threshold: Annotated[
        str, typer.Option(metavar="T[,T]", help="Confidence at which a token leaves.", rich_help_panel=EXITS)
    ] = DEMO_THRESHOLD,
    measure: Measure = None,
    min_layers: MinLayers = None,
    exit_layers: ExitLayers = None,
    max_tokens: Annotated[int, typer.Option(help="Answer tokens at the most.", rich_help_panel=SAMPLING)] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds for the table; medians are shown.")] = 3,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """A short tour: answers shaded by exit layer, then early exit beside full depth."""
    with reported_errors():
        early_exit = early_exit_params(False, threshold, measure, None, min_layers)
        from eejax.cli.demo import DEMO_PROMPTS, demo_path, tour

        folder = demo_path() if path is None else path
        texts = read_prompts(DEMO_PROMPTS if file is None else file)
        llm = load(
            folder,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=1,
            exit_layers=integers("--exit-layers", exit_layers),
        )
        if early_exit is not None:
            check_exits(llm, early_exit)
        prompts = in_chat_template(llm, texts)
        tour(
            llm, texts, prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens, early_exit=early_exit), repeats
        )


app.command("tune-exits")(tune_exits)
app.command("train-length")(train_length)
app.command()(calibrate)


def load(path: Path, **options: Any) -> LLM:
    """The model in `path`. A terminal is told while it loads, and what that took."""
    # A refused request is reported by its own red line, not by the library's warning as well.
    logging.getLogger("eejax").addHandler(logging.NullHandler())
    start = time.perf_counter()
    with status(f"loading {path}") as stages:
        from eejax.serve import LLM
        from eejax.text import require_tokenizer

        if path.is_dir():
            require_tokenizer(path)  # the API takes token ids instead, the command line only text
        llm = LLM(path, **options)
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        text = f"loaded in {time.perf_counter() - start:.1f} s: {summary(stages)}"
        console.print(text, style="dim", soft_wrap=True)
    return llm


def check_exits(llm: LLM, early_exit: EarlyExitParams) -> None:
    """Refuse what this model cannot do, since wrong for one prompt is wrong for all; say if nothing was certified."""
    limits = llm.engine.calibrated.thresholds_for(early_exit, llm.config.model)
    if early_exit.threshold == CALIBRATED and not any(map(math.isfinite, limits)):
        text = f"no threshold of measure {early_exit.measure} was certified: full depth"
        Console(stderr=True, highlight=False).print(text, style="yellow", soft_wrap=True)


def in_chat_template(llm: LLM, texts: Sequence[str]) -> list[PromptLike]:
    """Each text as the only message of a conversation, as `LLM.chat` sends it."""
    return [{"prompt_token_ids": prompt_ids(llm.tokenizer, text)} for text in texts]


def prompts_from(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, of `--file`, or of stdin."""
    if given and file is not None:
        raise ConfigError("give prompts or --file, not both")
    if file is not None:
        return read_prompts(file)
    if given:
        return list(given)
    if sys.stdin.isatty():
        raise ConfigError("there is no prompt: give one, or --file, or pipe one in")
    text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise ConfigError("there is no prompt: stdin is empty")
    return [text]


def early_exit_params(
    full_depth: bool,
    threshold: str | None,
    measure: str | None,
    tau: float | None,
    min_layers: int | None,
    gate: float | None = None,
) -> EarlyExitParams | None:
    """What the flags ask for; flags not given keep the defaults of `EarlyExitParams`."""
    flags = {
        "--threshold": threshold,
        "--measure": measure,
        "--tau": tau,
        "--min-layers": min_layers,
        "--gate": gate,
    }
    given = [name for name, value in flags.items() if value is not None]
    if full_depth and given:
        raise ConfigError(f"--full-depth runs every block, so {', '.join(given)} cannot be given with it")
    if full_depth:
        return None
    chosen: dict[str, Any] = {}
    if threshold is not None:
        values = (CALIBRATED,) if threshold == CALIBRATED else numbers("--threshold", threshold)
        chosen["threshold"] = values[0] if len(values) == 1 else values
    if tau is not None:
        chosen["threshold"] = DecayingThreshold(chosen.get("threshold", EarlyExitParams().threshold), tau)
    if measure is not None:
        chosen["measure"] = measure
    if min_layers is not None:
        chosen["min_layers"] = min_layers
    if gate is not None:
        chosen["gate"] = gate
    return EarlyExitParams(**chosen)
