"""What the command line prints: answers, errors, a closing line. Nothing here imports jax."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from eejax.core import (
    CompletionOutput,
    ConfigError,
    EejaxError,
    InvalidRequestError,
    PromptLike,
    RequestOutput,
    SamplingParams,
    Step,
    begun,
    describe,
    heard,
)

if TYPE_CHECKING:
    from eejax.serve import LLM


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn what a user can act on into one red line on stderr and exit code 2; an interruption into code 130."""
    try:
        yield
    except EejaxError as error:
        print_error(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        Console(stderr=True).print("interrupted", style="yellow")
        raise typer.Exit(130) from error


def print_error(error: EejaxError, where: str = "") -> None:
    """One line on stderr, red where stderr has colours; `where` goes before the message."""
    text = where + " ".join(str(error).split())
    Console(stderr=True, highlight=False).print(f"error: {text}", style="bold red", markup=False, soft_wrap=True)


def answer_together(
    llm: LLM, texts: list[str], prompts: list[PromptLike], params: SamplingParams, as_json: bool
) -> bool:
    """Answer all prompts together and print them in order. Returns whether all could be served."""
    start = time.perf_counter()
    steps: list[Step] = []
    with heard(steps.append):
        outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
    seconds = time.perf_counter() - start
    several = len(prompts) > 1
    for number, (text, output) in enumerate(zip(texts, outputs, strict=True), start=1):
        if as_json:
            print(json.dumps(as_mapping(text, output), ensure_ascii=False))
        else:
            for answer in output.outputs:
                if several or params.n > 1:
                    print(f"--- prompt {number}" + (f", answer {answer.index + 1}" if params.n > 1 else ""))
                print(answer.text)
        if output.error is not None:
            print_error(output.error, f"prompt {number}: " if several else "")
    answers = [answer for output in outputs for answer in output.outputs]
    layers = [layer for answer in answers for layer in answer.exit_layers[1:]]
    print_summary(llm, layers, len(answers), seconds, steps)
    return all(output.error is None for output in outputs)


def answer_one_by_one(
    llm: LLM, texts: list[str], prompts: list[PromptLike], params: SamplingParams, as_json: bool
) -> bool:
    """Answer one prompt after the other, printing what is new. Returns whether all could be served."""
    start = time.perf_counter()
    steps: list[Step] = []
    layers: list[int] = []
    served = 0
    several = len(prompts) > 1
    for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True), start=1):
        try:
            deltas = llm.stream(prompt, params)
        except InvalidRequestError as error:
            print_error(error, f"prompt {number}: " if several else "")
            continue
        if several and not as_json:
            print(f"--- prompt {number}")
        seen: list[int] = []
        for delta in begun(deltas, lambda: llm.engine.runner.decode_program_for([params]), steps):
            seen += delta.exit_layers
            if as_json:
                print(json.dumps({"prompt": text, **dataclasses.asdict(delta)}, ensure_ascii=False), flush=True)
            else:
                print(delta.text, end="", flush=True)
        if not as_json:
            print()
        layers += seen[1:]
        served += 1
    print_summary(llm, layers, served, time.perf_counter() - start, steps)
    return served == len(prompts)


def as_mapping(text: str, output: RequestOutput) -> dict[str, Any]:
    """One prompt's line of `--json`."""
    return {
        "prompt": text,
        "prompt_token_ids": output.prompt_token_ids,
        "outputs": [_answer_mapping(answer) for answer in output.outputs],
        "error": None if output.error is None else str(output.error),
    }


def _answer_mapping(answer: CompletionOutput) -> dict[str, Any]:
    found = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "exit_layers": answer.exit_layers,
        "finish_reason": answer.finish_reason,
    }
    if answer.logprobs is not None:
        found["logprobs"] = [{token: one.logprob for token, one in step.items()} for step in answer.logprobs]
    return found


def print_summary(llm: LLM, layers: Sequence[int], answers: int, seconds: float, steps: Sequence[Step]) -> None:
    """Say on stderr how many tokens came, what programs took of that time, and how deep decoding went.

    Args:
        layers: exit layers of all tokens but each answer's first, which comes from prefill.
        steps: of starting up that fell into `seconds`.
    """
    if not answers:
        return
    tokens, depth = len(layers) + answers, llm.config.model.n_layers
    text = f"{tokens} tokens in {seconds:.2f} s with prefill"
    text += f", of it {describe(steps)}" if steps else ""
    if layers:
        mean = sum(layers) / len(layers)
        text += f"; {mean:.2f} of {depth} blocks a decoded token, {1 - mean / depth:.0%} skipped"
    Console(stderr=True, highlight=False).print(text, style="dim", soft_wrap=True)


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """`0.8,0.9` as numbers. Raises `ConfigError` where it is something else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} must be numbers with commas between them, got {text!r}") from None


def integers(flag: str, text: str | None) -> tuple[int, ...] | None:
    """`4,8` as integers; None stays None. Raises `ConfigError` where it is something else."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} must be integers with commas between them, got {text!r}") from None
