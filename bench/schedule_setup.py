"""What `bench.schedule` and `bench.simulate` share: rows, requests, and an engine that answers them by turns."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from bench.common import ModelOptions, at_least, early_exit_params
from bench.drive import Answers, OraclePredictor, answer_all
from bench.paper import PaperScheduler
from eejax import LLM, SamplingParams
from eejax.core import ConfigError, EarlyExitParams, PolicyName, PredictorName, PromptLike
from eejax.schedule import LengthHeads, LengthPredictor, Scheduler, load_length_heads, make_predictor
from eejax.text import prompt_ids, read_prompts

REGIMES = ("roomy", "limited")
MODES = ("full_depth", "early_exit")
PROMPTS = Path("bench/schedule_prompts.jsonl")
MODEL = "checkpoints/demo"
LONGEST_RANDOM_PROMPT = 48


@dataclass(frozen=True, slots=True)
class Row:
    """One way to schedule: a policy of ours, or the paper's method with these options (`bench.paper.PaperOptions`)."""

    policy: PolicyName = "static"
    predictor: PredictorName | str = "constant"
    paper: Mapping[str, bool] | None = None


ROWS = {
    "static": Row(),
    "static_oracle": Row(predictor="oracle", paper={"ordered": True}),
    "binned": Row(predictor="prompt", paper={"ordered": True}),
    "binned_fcr": Row(predictor="prompt", paper={"ordered": True, "fcr": True}),
    "binned_vbs": Row(predictor="prompt", paper={"ordered": True, "vbs": True}),
    "paper": Row(predictor="prompt", paper={"ordered": True, "fcr": True, "vbs": True}),
    "paper_oracle": Row(predictor="oracle", paper={"ordered": True, "fcr": True, "vbs": True}),
    "fcfs": Row("fcfs"),
    "length_constant": Row("length", "constant"),
    "length_prompt": Row("length", "prompt"),
    "length_hidden": Row("length", "hidden"),
    "length_perception": Row("length", "perception"),
    "length_oracle": Row("length", "oracle"),
}


def request_options(parser: argparse.ArgumentParser, num_iters: int) -> None:
    """Add what says which requests are answered, by how many slots."""
    parser.add_argument("--prompts", type=Path, metavar="FILE", default=PROMPTS, help="JSONL (the project's own)")
    parser.add_argument("--num-prompts", type=at_least(2), default=96, help="requests (%(default)s)")
    parser.add_argument("--max-tokens", type=at_least(2), default=512, help="of an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="each request has its seed (%(default)s)")
    parser.add_argument("--max-num-seqs", type=at_least(1), default=32, help="slots (%(default)s)")
    parser.add_argument("--vbs-num-seqs", type=at_least(1), default=64, help="rows of the paper's (%(default)s)")
    parser.add_argument("--paper-quantile", type=float, default=0.6, help="that the paper's predict (%(default)s)")
    parser.add_argument("--num-pages", type=at_least(1), help="where memory is the limit (a quarter of the roomy)")
    parser.add_argument("--num-iters-warmup", type=at_least(0), default=1, help="untimed rounds (%(default)s)")
    parser.add_argument("--num-iters", type=at_least(1), default=num_iters, help="timed rounds (%(default)s)")


def parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The arguments, with the demo model where none is named and a threshold of 0.5 where no exits are drawn."""
    named = any(one.partition("=")[0] in ("--model", "--random", "-h", "--help") for one in arguments)
    args = parser.parse_args(arguments if named else ["--model", MODEL, *arguments])
    if args.threshold is None and args.replay is None:
        args.threshold = (0.5,)
    return args


def paper_scheduler(row: Row, *, max_rows: int, quantile: float) -> Callable[..., Scheduler] | None:
    """The maker of the scheduler for the paper's rows; None for the others."""
    if row.paper is None:
        return None
    return partial(PaperScheduler, paper={**row.paper, "max_rows": max_rows, "quantile": quantile})


class Bench:
    """The engine, the requests, and how each row schedules them.

    Attributes:
        lengths: of the answers, by mode and prompt.
        differing: requests of which some round gave other tokens than the first round of the same mode.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        chosen = ModelOptions.of(args)
        self.args = args
        self.name = chosen.name
        longest = LONGEST_RANDOM_PROMPT + args.max_tokens if args.random else None
        self.llm: LLM = chosen.build(max_model_len=longest, max_num_seqs=args.max_num_seqs)
        self.engine, config = self.llm.engine, self.llm.config
        self.prompts = self._prompts()
        self.exits: dict[str, EarlyExitParams | None] = {
            "full_depth": None,
            "early_exit": early_exit_params(args, config.model) if config.model.exits.layers else None,
        }
        longest = max(len(prompt) for prompt in self.prompts) + args.max_tokens
        each = -(-min(longest, config.max_model_len) // config.cache.page_size)
        roomy = min(config.cache.num_pages, each * args.max_num_seqs)
        self.num_pages = {"roomy": roomy, "limited": args.num_pages or max(each, roomy // 4)}
        self.heads: LengthHeads | None = load_length_heads(args.model, config.model) if args.model else None
        self.lengths: dict[str, dict[tuple[int, ...], int]] = {}
        self.reference: dict[str, Answers] = {}
        self.differing: dict[str, set[int]] = {}

    def _prompts(self) -> list[tuple[int, ...]]:
        """Token ids, no two alike: the oracle goes by them."""
        args, tokenizer = self.args, self.llm.tokenizer
        if args.random is not None:
            rng = np.random.default_rng(args.seed)
            sizes = rng.integers(8, LONGEST_RANDOM_PROMPT, args.num_prompts)
            vocabulary = self.llm.config.model.vocab_size
            return [tuple(rng.integers(vocabulary // 2, vocabulary, size).tolist()) for size in sizes]
        if tokenizer is None:
            raise ConfigError("scheduling is measured on texts, and this model has no tokenizer")
        texts = list(dict.fromkeys(read_prompts(args.prompts)))
        if len(texts) < args.num_prompts:
            raise ConfigError(f"{args.prompts} holds {len(texts)} different prompts, {args.num_prompts} are needed")
        return [tuple(prompt_ids(tokenizer, text)) for text in texts[: args.num_prompts]]

    def requests(self, mode: str) -> tuple[list[PromptLike], list[SamplingParams]]:
        """Prompts, and parameters with a seed each; random weights end an answer at any of eight tokens."""
        args = self.args
        ends = range(min(8, self.llm.config.model.vocab_size)) if args.random else ()
        params = [
            SamplingParams(
                temperature=args.temperature,
                max_tokens=args.max_tokens,
                seed=args.seed + i,
                stop_token_ids=tuple(ends),
                early_exit=self.exits[mode],
            )
            for i in range(len(self.prompts))
        ]
        return [{"prompt_token_ids": list(prompt)} for prompt in self.prompts], params

    def predictor(self, row: Row, mode: str) -> LengthPredictor:
        """The row's predictor of lengths. Without trained heads the paper's rows know the limit only."""
        if row.predictor == "oracle":
            return OraclePredictor(self.lengths[mode])
        name: Any = "constant" if row.paper is not None and self.heads is None else row.predictor
        return make_predictor(name, self.heads, self.llm.tokenizer)

    def rows(self) -> dict[str, Row]:
        """The rows asked for; where none are, those that the model has predictors for."""
        if self.args.rows is not None:
            return {name: ROWS[name] for name in self.args.rows}
        missing = {"prompt", "hidden"} if self.heads is None else set()
        missing |= {"perception"} if self.llm.tokenizer is None else set()
        return {name: row for name, row in ROWS.items() if row.paper is not None or row.predictor not in missing}

    def learn_answers(self) -> None:
        """Answer everything once in each mode, and keep the answers: the oracle's lengths, and what rows must equal."""
        self.llm.warm_up()
        runner = self.engine.runner
        for size in {runner.decode_bucket(count + 1) for count in range(self.args.vbs_num_seqs)}:
            runner.decode_program(size)
        for mode in MODES:
            self.engine.reschedule(self.llm.config.scheduler)
            answers = answer_all(self.engine, *self.requests(mode))
            self.reference[mode] = answers
            self.differing[mode] = set()
            known = zip(self.prompts, answers.outputs, strict=True)
            self.lengths[mode] = {prompt: len(output.token_ids) for prompt, output in known}

    def run(self, row: Row, regime: str, mode: str, arrivals: Sequence[float] | None = None) -> Answers:
        """Answer everything once in this way."""
        pages = self.num_pages[regime]
        config = replace(self.llm.config.scheduler, policy=row.policy)
        scheduler = paper_scheduler(row, max_rows=self.args.vbs_num_seqs, quantile=self.args.paper_quantile)
        self.engine.reschedule(config, predictor=self.predictor(row, mode), num_pages=pages, scheduler=scheduler)
        answers = answer_all(self.engine, *self.requests(mode), arrivals)
        for i, (mine, known) in enumerate(zip(answers.outputs, self.reference[mode].outputs, strict=True)):
            if mine.token_ids != known.token_ids:
                self.differing[mode].add(i)
        return answers

    def interleaved(
        self, cells: Sequence[tuple[str, str, str]], arrivals: Mapping[int, Sequence[float]] | None = None
    ) -> dict[tuple[str, str, str], list[Answers]]:
        """Timed rounds of every `(regime, mode, row)`, each round in an order of its own.

        Args:
            arrivals: of each timed round, when not all at once; such rounds need no warming up.
        """
        args, rng = self.args, random.Random(self.args.seed)
        warmup = 0 if arrivals else args.num_iters_warmup
        todo = [(i, cell) for i in range(warmup + args.num_iters) for cell in rng.sample(cells, len(cells))]
        found: dict[tuple[str, str, str], list[Answers]] = {cell: [] for cell in cells}
        console = Console(stderr=True)
        for i, cell in track(todo, "rounds", console=console, transient=True, disable=not sys.stderr.isatty()):
            regime, mode, name = cell
            one = self.run(ROWS[name], regime, mode, arrivals[i] if arrivals else None)
            if i >= warmup:
                found[cell].append(one)
        return found
