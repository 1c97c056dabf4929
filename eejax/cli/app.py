"""The command line: `eejax generate`, `info`, `demo`, `tune-exits`, `train-length`, `calibrate`.

Flags have the names of the fields they set, and most are made from those fields. jax is imported inside the commands,
so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from eejax.cli.calibrate import calibrate
from eejax.cli.flags import flag_names, flags_of, given, numbers, takes
from eejax.cli.terminal import answer_one_by_one, answer_together, reported_errors, status, summary
from eejax.cli.train_length import train_length
from eejax.cli.tune_exits import tune_exits
from eejax.core import (
    CALIBRATED,
    ConfigError,
    DecayingThreshold,
    EarlyExitParams,
    EngineOptions,
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
"""A small model is seldom confident: at 0.9 hardly any of the demo's tokens would exit early."""
EXITS, SAMPLING, ENGINE = "Early exit", "Sampling", "Engine"

CheckpointPath = Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint folder.", show_default=False)]
EXIT_LAYERS = flags_of(EngineOptions, EXITS, only=["exit_layers"])


def main() -> None:
    """Console entry point."""
    app()


@app.command()
@takes(
    flags_of(EarlyExitParams, EXITS),
    flags_of(DecayingThreshold, EXITS, defaults={"tau": None}),
    EXIT_LAYERS,
    flags_of(SamplingParams, SAMPLING, defaults={"max_tokens": 256, "temperature": 0.0}),
    flags_of(EngineOptions, ENGINE, without=["exit_layers", "seed", "length_predictor"]),
)
def generate(
    path: CheckpointPath,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; without any, stdin is one prompt.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='Prompts, one per line; in a .jsonl file, objects with a "prompt".')
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as they are, as for a checkpoint that has no chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print answers while they are generated.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line, with exit layers.")] = False,
    full_depth: Annotated[
        bool, typer.Option("--full-depth", help="Run every block for every token.", rich_help_panel=EXITS)
    ] = False,
    **flags: Any,
) -> None:
    """Answer prompts."""
    with reported_errors():
        params = SamplingParams(**given(flags, SamplingParams), early_exit=early_exit_params(flags, full_depth))
        if stream and params.n != 1:
            raise ConfigError(f"--stream shows one answer to each prompt, so --n must be 1, got {params.n}")
        if params.logprobs is not None and (stream or not as_json):
            raise ConfigError("--logprobs is reported with --json and without --stream")
        texts = prompts_from(prompt or [], file)
        llm = load(path, **given(flags, EngineOptions))  # --seed is the engine's as well, which does not use it then
        if params.early_exit is not None:
            check_exits(llm, params.early_exit)
        prompts: list[PromptLike] = [*texts] if raw else in_chat_template(llm, texts)
        answer = answer_one_by_one if stream else answer_together
        if not answer(llm, texts, prompts, params, as_json):
            raise typer.Exit(2)


@app.command()
@takes(flags_of(EngineOptions, ENGINE, only=["dtype", "page_size"]))
def info(
    path: CheckpointPath,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    **flags: Any,
) -> None:
    """Show what a checkpoint contains and what serving it takes."""
    with reported_errors():
        from eejax.cli.info import describe, print_description

        found = describe(path, EngineOptions(**given(flags, EngineOptions)))
        if as_json:
            print(json.dumps(found))
        else:
            print_description(found)


@app.command()
@takes(
    flags_of(EarlyExitParams, EXITS, without=["gate"], defaults={"threshold": DEMO_THRESHOLD}),
    EXIT_LAYERS,
    flags_of(SamplingParams, SAMPLING, only=["max_tokens"], defaults={"max_tokens": 96}),
    flags_of(EngineOptions, ENGINE, only=["dtype", "max_model_len"]),
)
def demo(
    path: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint folder; the repository's demo model by default.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Other prompts, as for generate.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds for the table; medians are shown.")] = 3,
    **flags: Any,
) -> None:
    """A short tour: answers shaded by exit layer, then early exit compared with full depth."""
    with reported_errors():
        early_exit = early_exit_params(flags)
        params = SamplingParams(temperature=0.0, early_exit=early_exit, **given(flags, SamplingParams))
        from eejax.cli.demo import DEMO_PROMPTS, demo_path, tour

        folder = demo_path() if path is None else path
        texts = read_prompts(DEMO_PROMPTS if file is None else file)
        llm = load(folder, max_num_seqs=1, **given(flags, EngineOptions))
        if early_exit is not None:
            check_exits(llm, early_exit)
        tour(llm, texts, in_chat_template(llm, texts), params, repeats)


app.command("tune-exits")(tune_exits)
app.command("train-length")(train_length)
app.command()(calibrate)


def load(path: Path, **options: Any) -> LLM:
    """The model in `path`. A terminal shows the stages of loading, and the time they took."""
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
    """Check the exits before any prompt is answered, since all prompts use them; warn if no threshold was certified."""
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


def early_exit_params(flags: Mapping[str, Any], full_depth: bool = False) -> EarlyExitParams | None:
    """What the flags ask for, None for full depth. Flags not given keep the defaults of `EarlyExitParams`."""
    chosen = given(flags, EarlyExitParams) | given(flags, DecayingThreshold)
    if full_depth and chosen:
        names = ", ".join(flag_names(name)[0] for name in chosen)
        raise ConfigError(f"--full-depth runs every block, so {names} cannot be given with it")
    if full_depth:
        return None
    tau = chosen.pop("tau", None)
    if chosen.get("threshold", CALIBRATED) != CALIBRATED:
        values = numbers("--threshold", chosen["threshold"])
        chosen["threshold"] = values[0] if len(values) == 1 else values
    if tau is not None:
        chosen["threshold"] = DecayingThreshold(chosen.get("threshold", EarlyExitParams().threshold), tau)
    return EarlyExitParams(**chosen)
