"""What the benchmarks share: options, the model under test, and how results are shown."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.cost import ModelCost
from bench.rounding import rounded
from bench.shapes import SHAPES, shape
from eejax import LLM, EarlyExitParams
from eejax.core import (
    DTYPES,
    MODEL_MEASURES,
    ConfigError,
    DecodeConfig,
    EngineOptions,
    ModelConfig,
    PromptLike,
    help_of,
)
from eejax.device import resolve_dtype
from eejax.model import INIT_SCALE, count_params, leaves, param_shapes, rebuild
from eejax.text import prompt_ids, read_prompts

GPU_WORKING_SET = 8 * 2**30
DECODE_OPTIONS = tuple(field.name for field in fields(DecodeConfig))


def numbers(text: str) -> tuple[float, ...]:
    """`0.7,0.2` as a tuple."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.7,0.2") from None


def integers(text: str) -> tuple[int, ...]:
    """`4,8` as a tuple."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of block numbers such as 4,8") from None


def words(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser for some of `allowed`, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        unknown = [one for one in chosen if one not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(allowed)}")
        return chosen

    return parse


def at_least(low: int) -> Callable[[str], int]:
    """A parser for integers of at least `low`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low}")
        return int(text)

    return parse


def model_parser(name: str, what: str | None, default_model: str | None = None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, without those that set exits.

    Args:
        what: the benchmark's docstring, whose first line is shown.
        default_model: checkpoint folder where neither `--model` nor `--random` is given; without it one must be.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=(what or "").partition("\n")[0])
    model = parser.add_mutually_exclusive_group(required=default_model is None)
    shown = f" ({default_model})" if default_model else ""
    model.add_argument("--model", metavar="PATH", default=default_model, help=f"checkpoint folder{shown}")
    model.add_argument("--random", choices=sorted(SHAPES), help="random weights of this shape")
    add_engine_options(parser, "dtype", "exit_layers", "page_size")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, prompts and draws (%(default)s)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the result here too")
    return parser


def new_parser(name: str, what: str | None) -> argparse.ArgumentParser:
    """`model_parser`, and the options of one early-exit setting."""
    parser = model_parser(name, what)
    parser.add_argument("--threshold", type=numbers, metavar="T[,T]", help="confidence to leave, one or one per exit")
    parser.add_argument("--measure", choices=MODEL_MEASURES, help="confidence measure (softmax)")
    add_replay(parser)
    return parser


def add_replay(parser: argparse.ArgumentParser) -> None:
    """The option that draws exits instead of asking for them."""
    parser.add_argument(
        "--replay",
        type=numbers,
        metavar="F,F",
        help="shares of tokens that leave at each exit, drawn from a seeded distribution instead of asking the heads",
    )


def add_engine_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options of `LLM` as options of a benchmark, with the same defaults and help."""
    usual, texts, hints = EngineOptions(), help_of(EngineOptions), get_type_hints(EngineOptions)
    for name in names:
        choices = DTYPES if name == "dtype" else get_args(hints[name]) if get_origin(hints[name]) is Literal else None
        parse = {"exit_layers": integers, "page_size": at_least(1)}.get(name, str)
        shown = "" if getattr(usual, name) is None else " (%(default)s)"
        flag, text = f"--{name.replace('_', '-')}", texts[name].removesuffix(".") + shown
        parser.add_argument(flag, type=parse, choices=choices, default=getattr(usual, name), help=text)


def add_decode_options(parser: argparse.ArgumentParser) -> None:
    """The options of `LLM` that say how a batch takes its rows' exits."""
    add_engine_options(parser, *DECODE_OPTIONS)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model to build. `random` names a shape, else `model` names a checkpoint folder."""

    model: str | None
    random: str | None
    engine: EngineOptions

    @classmethod
    def of(cls, args: argparse.Namespace) -> ModelOptions:
        """From the parsed options of `model_parser`, and of `add_decode_options` where they were added."""
        names = ("dtype", "exit_layers", "page_size", "seed", *DECODE_OPTIONS)
        given = {name: getattr(args, name) for name in names if hasattr(args, name)}
        return cls(args.model, args.random, EngineOptions(**given))

    @property
    def name(self) -> str:
        """What to call the model in a table."""
        return self.random or Path(self.model or "").resolve().name

    def build(self, **more: Any) -> LLM:
        """Load or draw the weights. `more` are options of `LLM` besides those of the command line."""
        options = {**asdict(self.engine), **more}
        if self.random is None:
            return LLM(self.model or "", **options)
        config = shape(self.random, options.pop("exit_layers"))
        params = random_params(config, resolve_dtype(self.engine.dtype), self.engine.seed)
        return LLM.from_params(config, params, **options)


def random_params(config: ModelConfig, dtype: jnp.dtype, seed: int) -> dict:
    """Parameters distributed as `init_params` draws them, each made on the device in the `dtype` that it will have.

    So a model that only just fits is never there in float32, and every shape is compiled but once.
    """
    draw = jax.jit(
        lambda key, shape: (INIT_SCALE * jax.random.normal(key, shape)).astype(dtype), static_argnames="shape"
    )
    like, made, key = param_shapes(config), {}, jax.random.key(seed)
    for number, (name, leaf) in enumerate(leaves(like)):
        if len(leaf.shape) == 1:  # norms, else biases and probes
            made[name] = (jnp.ones if name.endswith("norm") else jnp.zeros)(leaf.shape, dtype)
        else:
            made[name] = draw(jax.random.fold_in(key, number), leaf.shape)
    return rebuild(like, made)


def early_exit_params(args: argparse.Namespace, config: ModelConfig) -> EarlyExitParams:
    """What `--threshold`, `--measure` and `--replay` ask for, checked against the model's exits."""
    if args.replay is not None:
        if args.threshold is not None or args.measure is not None:
            raise ConfigError("--replay draws the exits, so it cannot be used with --threshold or --measure")
        chosen = replay_params(args.replay)
    else:
        threshold = (0.9,) if args.threshold is None else args.threshold
        chosen = EarlyExitParams(threshold if len(threshold) > 1 else threshold[0], args.measure or "softmax")
    chosen.thresholds_for(config)
    return chosen


def replay_params(shares: Sequence[float]) -> EarlyExitParams:
    """Exits drawn so that a share `shares[i]` of all tokens leaves at exit `i`, and the rest run every block.

    The `random` measure draws one uniform number per token, the same at every exit, so a token leaves at the first exit
    whose threshold is one minus the shares up to there.
    """
    if not all(share >= 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ConfigError(f"--replay must be shares of at least 0 that sum to at most 1, got {tuple(shares)}")
    # Rounded, so that after 0.7 + 0.2 + 0.1 no token is left; a share of zero keeps the threshold before it.
    cumulative = [round(sum(shares[: i + 1]), 9) for i in range(len(shares))]
    return EarlyExitParams(threshold=tuple(max(0.0, 1.0 - c) for c in cumulative), measure="random")


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[PromptLike]:
    """`count` prompts of `length` random token ids; the lowest ids, often special, are left out."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(min(3, vocab_size - 1), vocab_size, (count, length))
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def text_prompts(llm: LLM, file: Path, count: int | None = None) -> list[PromptLike]:
    """The first `count` texts of `file` in the checkpoint's chat template. Raises `ConfigError` without a tokenizer."""
    if llm.tokenizer is None:
        raise ConfigError("--prompts needs a model with a tokenizer, so --model and not --random")
    return [{"prompt_token_ids": prompt_ids(llm.tokenizer, text)} for text in read_prompts(file, count)]


def dtype_of(llm: LLM) -> jnp.dtype:
    """Element type of the weights as they are served."""
    return jax.tree.leaves(llm.engine.runner.params)[0].dtype


def model_facts(llm: LLM, name: str, cost: ModelCost) -> dict[str, Any]:
    """What a result says about its model."""
    return {
        "name": name,
        "parameters": count_params(llm.engine.runner.params),
        "dtype": str(dtype_of(llm)),
        "n_layers": cost.n_layers,
        "exit_layers": list(llm.config.model.exits.layers),
        "head": llm.config.model.exits.head,
    }


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What limits a step, as measured in this run. Rates in bytes and operations per second."""

    bandwidth: float
    working_set: int
    arithmetic: float

    @classmethod
    def measure(cls, step_bytes: float, dtype: jnp.dtype) -> Ceiling:
        """Read bandwidth over 1 GiB, 8 on a GPU; over `step_bytes` where so few may stay in the last-level cache."""
        cached = step_bytes <= machine.last_level_cache_bytes() / 2
        # A GPU reads a GiB in the time that the way to it and back takes to be noticed.
        whole = machine.GIB if jax.default_backend() == "cpu" else GPU_WORKING_SET
        working_set = max(2**20, round(step_bytes)) if cached else whole
        return cls(machine.read_bandwidth(working_set, dtype.name), working_set, machine.arithmetic_rate(dtype.name))

    def better(self, other: Ceiling) -> Ceiling:
        """The higher rates of two measurements over the same working set."""
        return Ceiling(max(self.bandwidth, other.bandwidth), self.working_set, max(self.arithmetic, other.arithmetic))

    def to_dict(self) -> dict[str, Any]:
        return {
            "read_bandwidth_gb_s": self.bandwidth / 1e9,
            "read_bandwidth_working_set_mib": self.working_set / 2**20,
            "arithmetic_gop_s": self.arithmetic / 1e9,
        }


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, 90th and 99th percentile (linear interpolation) of `scale * values`."""
    found = np.percentile(np.asarray(values) * scale, [50, 90, 99])
    return dict(zip(("p50", "p90", "p99"), found.tolist(), strict=True))


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of this run, ready for JSON, without the places where results go: they are this machine's."""
    kept = {key: value for key, value in vars(args).items() if key not in ("output_json", "plot", "work")}
    return {key: str(value) if isinstance(value, Path) else value for key, value in kept.items()}


def table_row(name: str, modes: Mapping[str, Any], path: str, digits: int = 2, unit: float = 1.0) -> list[str]:
    """One line of a table: the figure at the dotted `path` of each mode, divided by `unit`."""

    def figure(mode: Any) -> str:
        for key in path.split("."):
            mode = mode[key]
        return f"{mode / unit:.{digits}f}"

    return [name, *map(figure, modes.values())]


def show_table(
    title: str,
    modes: Mapping[str, Any],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    ceiling: Mapping[str, float] | None,
) -> None:
    """Print a column for each mode, then notes, the machine's ceilings, and whether the clock saw a compilation."""
    table = Table()
    for i, column in enumerate(("", *modes)):
        table.add_column(column.replace("_", " "), justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width, and rich would wrap the title at 80 columns.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    if ceiling is not None:
        seen = (
            f"read bandwidth {ceiling['read_bandwidth_gb_s']:.1f} GB/s (best pass over "
            f"{ceiling['read_bandwidth_working_set_mib']:.0f} MiB), arithmetic "
            f"{ceiling['arithmetic_gop_s']:.0f} G operations/s, both the best before and after the rounds"
        )
        console.print(seen, markup=False, soft_wrap=True)
    if any(mode["compilations_while_timed"] for mode in modes.values()):
        console.print("WARNING: something was compiled while the clock ran", style="bold red")


def finish(result: dict[str, Any], output_json: Path | None) -> None:
    """Print the result as one line of JSON, the last one, and write it to `output_json` where given."""
    text = json.dumps(rounded(result), allow_nan=False)
    if output_json is not None:
        output_json.parent.mkdir(parents=True, exist_ok=True)
        output_json.write_text(text + "\n")
    print(text, flush=True)
