"""Where the time of a decode step goes: `python -m bench step --batch-sizes 1,32 --measures margin --thresholds 0.6`.

Full batches are answered at full depth and with early exit in turn, each time once as usual and once under XLA's
profiler. What the decode program ran is attributed to parts by the innermost scope (`jax.named_scope`) that an
instruction was traced in and that is the name of a part; where none is, a custom call is attributed by its target, and
what XLA added by itself is a copy. Moments in which loops alone run, or nothing, are control flow. What a call of the
engine takes beyond its program is the host's. A step is one token of every row, prefill left out.

The profiler lengthens a step by some amount for each operation, most where operations are short. So shares are those
of the profiled step, and what the profiler adds is stated beside them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from bench import machine
from bench.common import (
    ModelOptions,
    add_decode_options,
    add_replay,
    at_least,
    dtype_of,
    finish,
    median,
    model_facts,
    model_parser,
    numbers,
    options_of,
    random_prompts,
    show_table,
    table_row,
    text_prompts,
    words,
)
from bench.cost import ModelCost
from bench.exits.settings import PROMPTS, add_gates, batch_sizes, label_of, settings_of
from bench.rounds import request_params
from bench.shapes import shape
from bench.xla_profile import CONTROL_FLOW, SCOPES, cpu_runs, instructions, module_name, part_of, split, trace
from eejax import LLM, EarlyExitParams, SamplingParams
from eejax.core import MODEL_MEASURES, ConfigError, ModelConfig, PromptLike

PARTS = (*SCOPES, CONTROL_FLOW, "copies", "other", "host")


def parts_of(program: jax.stages.Compiled) -> tuple[str, dict[str, str]]:
    """A program's name, and the part of each of its instructions by name."""
    text = program.as_text() or ""
    return module_name(text), {name: part_of(one) for name, one in instructions(text).items()}


@dataclass(frozen=True, slots=True)
class Decoding:
    """A batch answered once: what its calls of the engine that decoded took, and ran.

    Attributes:
        buckets: rows that the program of each such call computes, in order.
        passes: of the batch through the network; more than tokens of a row where rows are held.
    """

    seconds: float
    buckets: tuple[int, ...]
    passes: int
    blocks: int
    heads: int
    compilations: int


def decode(llm: LLM, prompts: Sequence[PromptLike], params: Sequence[SamplingParams]) -> Decoding:
    """Answer a batch, and keep time of those calls of the engine that decode."""
    engine = llm.engine
    for prompt, one in zip(prompts, params, strict=True):
        engine.add_request(prompt, one)
    first = before = engine.stats()
    seconds, buckets = 0.0, []
    while engine.has_unfinished:
        start = time.perf_counter()
        engine.step()
        took = time.perf_counter() - start
        after = engine.stats()
        if passes := after.steps - before.steps:
            seconds += took
            buckets.append((after.row_steps - before.row_steps) // passes)
        before = after
    return Decoding(
        seconds,
        tuple(buckets),
        before.steps - first.steps,
        before.blocks_run - first.blocks_run,
        before.heads_run - first.heads_run,
        before.compilations - first.compilations,
    )


@dataclass(frozen=True, slots=True)
class Profile:
    """A `Decoding` under the profiler, its seconds by part, which sum to its own, and the operations that it ran."""

    decoding: Decoding
    parts: dict[str, float]
    operations: int


def profile(
    llm: LLM,
    prompts: Sequence[PromptLike],
    params: Sequence[SamplingParams],
    read: Callable[[jax.stages.Compiled], tuple[str, dict[str, str]]] = parts_of,
) -> Profile:
    """Answer a batch under the profiler; `read` is `parts_of`, which may remember the programs it has read."""
    with tempfile.TemporaryDirectory(prefix="eejax-profile-") as folder:
        with trace(Path(folder)):
            decoding = decode(llm, prompts, params)
        programs = [read(llm.engine.runner.decode_program(bucket)) for bucket in decoding.buckets]
        runs = cpu_runs(Path(folder), programs[0][0])
    found: Counter[str] = Counter()
    for run, (_, parts) in zip(runs, programs, strict=True):
        found.update(split(run, parts))
    seconds = {part: found[part] / 1e9 for part in PARTS}
    seconds["host"] = decoding.seconds - sum(seconds.values())
    return Profile(decoding, seconds, sum(map(len, runs)))


def figures(plain: Sequence[Decoding], profiled: Sequence[Profile], steps: int) -> dict[str, Any]:
    """What a mode came to; parts are of the profiled round that took the median time, so that they sum to it.

    Args:
        steps: tokens that a row decodes in a round.
    """
    usual = sorted(profiled, key=lambda one: one.decoding.seconds)[len(profiled) // 2]
    whole, step = usual.decoding.seconds, median([one.seconds for one in plain]) / steps
    return {
        "step_ms": 1e3 * step,
        "profiled_step_ms": 1e3 * whole / steps,
        "profiled_over_unprofiled": whole / steps / step,
        "parts": {
            part: {"ms": 1e3 * seconds / steps, "share": seconds / whole} for part, seconds in usual.parts.items()
        },
        "operations_per_step": usual.operations / steps,
        "passes_per_step": usual.decoding.passes / steps,
        "blocks_per_step": usual.decoding.blocks / steps,
        "heads_per_step": usual.decoding.heads / steps,
        "rounds_ms_per_step": [1e3 * one.seconds / steps for one in plain],
        "compilations_while_timed": sum(one.compilations for one in (*plain, *(two.decoding for two in profiled))),
    }


@contextmanager
def scopes_kept() -> Iterator[None]:
    """Caches tell programs apart by their scopes too, which run the same: a kept one may be older than its scopes."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = model_parser("step", __doc__, default_model="checkpoints/demo")
    add_decode_options(found)
    names = ",".join(MODEL_MEASURES)
    found.add_argument("--measures", type=words(MODEL_MEASURES), help=f"some of {names}, beside full depth")
    found.add_argument("--thresholds", type=numbers, metavar="T,T", help="of every measure")
    add_gates(found)
    add_replay(found)
    found.add_argument("--batch-sizes", type=batch_sizes, default=(1, 32), metavar="B,B", help="requests at once")
    found.add_argument("--input-len", type=at_least(1), default=32, help="prompt tokens, with --random (%(default)s)")
    found.add_argument("--output-len", type=at_least(2), default=64, help="answer tokens (%(default)s)")
    found.add_argument("--num-iters", type=at_least(1), default=5, help="rounds of each mode (%(default)s)")
    return found


def modes_of(args: argparse.Namespace, config: ModelConfig) -> dict[str, EarlyExitParams | None]:
    """Full depth, and what the options ask for beside it, by name."""
    found: dict[str, EarlyExitParams | None] = {"full_depth": None}
    if (args.measures is None) != (args.thresholds is None) and args.replay is None:
        raise ConfigError("--measures and --thresholds say together who leaves: both must be given, or neither")
    if args.measures is not None or args.replay is not None:
        for one in settings_of(argparse.Namespace(**vars(args), plot=None, text=None), config):
            found["replay" if args.replay else label_of(one)] = one
    return found


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.model = None if args.random else args.model
    if jax.default_backend() != "cpu":
        raise ConfigError("bench step reads traces of a CPU; python -m bench.gpu.profile reads those of a GPU")
    with scopes_kept():
        finish(_run(args), args.output_json)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    chosen, top, steps = ModelOptions.of(args), max(args.batch_sizes), args.output_len - 1
    length = None if args.random is None else min(args.input_len + args.output_len, shape(args.random).max_position)
    llm = chosen.build(max_model_len=length, max_num_seqs=top)
    config, modes = llm.config.model, modes_of(args, llm.config.model)
    if llm.tokenizer is None:
        prompts = random_prompts(top, args.input_len, config.vocab_size, args.seed)
    else:
        prompts = text_prompts(llm, PROMPTS, top)
    console, read = Console(stderr=True), cache(parts_of)
    batches: dict[int, dict[str, Any]] = {}
    for batch in args.batch_sizes:
        rounds: dict[str, list[tuple[Decoding, Profile]]] = {mode: [] for mode in modes}
        todo = [(i, mode) for i in range(1 + args.num_iters) for mode in modes]
        for i, mode in track(todo, "rounds", console=console, transient=True, disable=not sys.stderr.isatty()):
            mine = prompts[:batch], request_params(batch, args.output_len, args.seed, modes[mode], ignore_eos=True)
            one = decode(llm, *mine), profile(llm, *mine, read)
            if i:  # the first round compiles
                rounds[mode].append(one)
        batches[batch] = {
            mode: figures([one for one, _ in pairs], [one for _, one in pairs], steps) for mode, pairs in rounds.items()
        }
        _show(chosen.name, batch, batches[batch], args)
    return {
        "bench": "step",
        **machine.provenance(),
        "model": model_facts(llm, chosen.name, ModelCost.of(config, dtype_of(llm).itemsize)),
        "options": options_of(args),
        "batches": batches,
    }


def _show(name: str, batch: int, modes: dict[str, Any], args: argparse.Namespace) -> None:
    shares = [[f"{mode['parts'][part]['ms']:.3f} {mode['parts'][part]['share']:4.0%}" for mode in modes.values()]
              for part in PARTS]  # fmt: skip
    rows = [
        table_row("ms a step", modes, "step_ms", digits=3),
        table_row("ms a step under the profiler", modes, "profiled_step_ms", digits=3),
        *([f"  {part}", *cells] for part, cells in zip(PARTS, shares, strict=True)),
        table_row("operations run a step", modes, "operations_per_step", digits=0),
        table_row("passes a step", modes, "passes_per_step"),
        table_row("blocks run a step", modes, "blocks_per_step"),
        table_row("heads asked a step", modes, "heads_per_step"),
    ]
    slower = ", ".join(
        f"{mode['profiled_over_unprofiled']:.2f} ({key.replace('_', ' ')})" for key, mode in modes.items()
    )
    notes = [f"parts are of the profiled step, which takes {slower} times as long as one without the profiler"]
    title = f"step: {name}, batch {batch}, {args.output_len} tokens out, {args.num_iters} rounds each"
    show_table(title, modes, rows, notes, None)
