"""Output of the command line: status, answers, errors, a closing line. Nothing here imports jax."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from eejax.core import (
    CompletionOutput,
    EejaxError,
    InvalidRequestError,
    PromptLike,
    RequestOutput,
    SamplingParams,
    Stage,
    heard,
)

if TYPE_CHECKING:
    from eejax.serve import LLM


@contextmanager
def reported_errors() -> Iterator[None]:
    """Report eejax's errors as one red line on stderr, with exit code 2; an interruption gives code 130."""
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


@contextmanager
def status(idle: str) -> Iterator[list[Stage]]:
    """A line on stderr, if that is a terminal, with the present stage of start-up, or `idle` between stages.

    Yields:
        The stages that ended; complete when the body has ended.
    """
    done: list[Stage] = []
    with Console(stderr=True).status(idle) as line:

        def show(stage: Stage) -> None:
            if stage.seconds is not None:
                done.append(stage)
            line.update(idle if stage.seconds is not None else str(stage))

        with heard(show):
            yield done


def begun[T](pieces: Iterator[T], prepare: Callable[[], object], stages: list[Stage]) -> Iterator[T]:
    """The pieces of an answer, the first of which is there already.

    Once there is text on a terminal, there is no room for a status line: what takes long has to come first.

    Args:
        prepare: makes ready what the later pieces need.
        stages: the stages of this call are appended to it.
    """
    with status("reading the prompt") as done:
        prepare()
        first = next(pieces)
    stages += done
    return itertools.chain([first], pieces)


def summary(stages: Sequence[Stage]) -> str:
    """Times of the stages that ended, for instance `weights 0.6 s, programs 3.1 s (1 compiled, 2 from the cache)`."""
    done = [stage for stage in stages if stage.seconds is not None]
    others = [f"{stage.what} {stage.seconds:.1f} s" for stage in done if not stage.program]
    programs = [stage for stage in done if stage.program]
    if programs:
        seconds, compiled = sum(stage.seconds or 0 for stage in programs), sum(stage.compiled for stage in programs)
        others.append(f"programs {seconds:.1f} s ({compiled} compiled, {len(programs) - compiled} from the cache)")
    return ", ".join(others)


def answer_together(
    llm: LLM, texts: list[str], prompts: list[PromptLike], params: SamplingParams, as_json: bool
) -> bool:
    """Answer all prompts together and print the answers in order. Returns whether all could be answered."""
    start = time.perf_counter()
    stages: list[Stage] = []
    with heard(stages.append):
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
    print_summary(llm, layers, len(answers), seconds, stages)
    return all(output.error is None for output in outputs)


def answer_one_by_one(
    llm: LLM, texts: list[str], prompts: list[PromptLike], params: SamplingParams, as_json: bool
) -> bool:
    """Answer one prompt after the other and print the pieces. Returns whether all could be answered."""
    start = time.perf_counter()
    stages: list[Stage] = []
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
        for delta in begun(deltas, lambda: llm.engine.runner.decode_program_for([params]), stages):
            seen += delta.exit_layers
            if as_json:
                print(json.dumps({"prompt": text, **dataclasses.asdict(delta)}, ensure_ascii=False), flush=True)
            else:
                print(delta.text, end="", flush=True)
        if not as_json:
            print()
        layers += seen[1:]
        served += 1
    print_summary(llm, layers, served, time.perf_counter() - start, stages)
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


def print_summary(llm: LLM, layers: Sequence[int], answers: int, seconds: float, stages: Sequence[Stage]) -> None:
    """Print on stderr the number of tokens, the time with the share of programs, and the mean depth of decoding.

    Args:
        layers: exit layers of all tokens but each answer's first, which comes from prefill.
        stages: the stages of start-up within `seconds`.
    """
    if not answers:
        return
    tokens, depth = len(layers) + answers, llm.config.model.n_layers
    text = f"{tokens} tokens in {seconds:.2f} s with prefill"
    text += f", including {summary(stages)}" if stages else ""
    if layers:
        mean = sum(layers) / len(layers)
        text += f"; {mean:.2f} of {depth} blocks per decoded token, {1 - mean / depth:.0%} skipped"
    Console(stderr=True, highlight=False).print(text, style="dim", soft_wrap=True)
