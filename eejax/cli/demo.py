"""The tour of `eejax demo`: answers shaded by exit layer, then early exit compared with full depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import Progress
from rich.style import Style
from rich.table import Table
from rich.text import Text

from eejax.cli.terminal import begun
from eejax.core import CheckpointError, CompletionOutput, ModelConfig, PromptLike, RequestOutput, SamplingParams
from eejax.serve import LLM
from eejax.text import Detokenizer

DEMO_PROMPTS = Path(__file__).with_name("demo_prompts.jsonl")
FIRST_SHADE, LAST_SHADE = (90, 200, 120), (250, 224, 140)
"""Backgrounds (red, green, blue) of tokens from the first and from the last exit; full depth has none."""


def demo_path() -> Path:
    """The demo model's folder in the checkout that this package is installed from.

    Raises:
        CheckpointError: there is none, for instance because the package was installed as a wheel.
    """
    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no demo model in {folder}; run this from a clone of the repository "
            "(`pip install -e .`), or name a checkpoint folder: `eejax demo PATH`"
        )
    return folder


def shades(model: ModelConfig) -> dict[int, Style]:
    """A style for every depth at which a token can exit, and for full depth."""
    exits = model.exits.layers
    styles = {model.n_layers: Style()}
    for i, layer in enumerate(exits):
        share = i / max(1, len(exits) - 1)
        red, green, blue = (round(a + share * (b - a)) for a, b in zip(FIRST_SHADE, LAST_SHADE, strict=True))
        styles[layer] = Style(color="black", bgcolor=f"rgb({red},{green},{blue})")
    return styles


@dataclass(frozen=True, slots=True)
class Run:
    """All prompts answered once, one after the other.

    Attributes:
        seconds: from first to last token, summed over answers.
        blocks, blocks_full: blocks run while decoding, and the number that full depth would have run.
    """

    outputs: tuple[RequestOutput, ...]
    seconds: float
    blocks: int
    blocks_full: int

    @property
    def answers(self) -> list[CompletionOutput]:
        """One answer to each prompt."""
        return [output.outputs[0] for output in self.outputs]

    @property
    def decoded(self) -> int:
        """Tokens decoded: all but each answer's first, which comes from prefill."""
        return sum(len(answer.token_ids) - 1 for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Rate of decoding; 0 if every answer is one token long."""
        return self.decoded / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far answers agree with those at full depth, over all prompts together.

    Attributes:
        same_place: equal tokens at equal positions, over the length of the longer answer.
        before_first_difference: tokens before an answer's first difference, over the length of the full-depth answer.
        whole: share of answers that are equal as a whole.
    """

    same_place: float
    before_first_difference: float
    whole: float


def agreement(full: Sequence[CompletionOutput], early: Sequence[CompletionOutput]) -> Agreement:
    """Compare the answers of two runs over the same prompts, each of which continued from its own tokens."""
    pairs = [(a.token_ids, b.token_ids) for a, b in zip(full, early, strict=True)]
    equal = prefix = 0
    for a, b in pairs:
        same = [x == y for x, y in zip(a, b, strict=False)]
        equal += sum(same)
        prefix += same.index(False) if False in same else len(same)
    longest = sum(max(len(a), len(b)) for a, b in pairs)
    return Agreement(
        same_place=equal / longest,
        before_first_difference=prefix / sum(len(a) for a, _ in pairs),
        whole=sum(a == b for a, b in pairs) / len(pairs),
    )


def tour(llm: LLM, texts: Sequence[str], prompts: Sequence[PromptLike], params: SamplingParams, repeats: int) -> None:
    """Stream every prompt's answer, then time early exit and full depth in alternation and print a comparison.

    Args:
        texts: what to show of the prompts.
        prompts: the same in the chat template.
        params: with early exit.
        repeats: timed rounds of each mode.
    """
    console = Console(highlight=False)
    _print_legend(console, llm.config.model)
    for text, prompt in zip(texts, prompts, strict=True):
        console.print()
        console.print(Text(f"> {text}", style="bold"), soft_wrap=True)
        layers = stream_shaded(console, llm, prompt, params)
        console.print(Text(describe_depth(layers, llm.config.model.n_layers), style="dim"), soft_wrap=True)
    console.print()
    runs = _timed(llm, prompts, params, repeats)
    _print_table(console, llm.config.model, runs)


def stream_shaded(console: Console, llm: LLM, prompt: PromptLike, params: SamplingParams) -> list[int]:
    """Stream one answer, each token on the shade of its exit layer. Returns its exit layers.

    A piece of the stream has several tokens, so they are detokenized here one by one. A character that consists of
    several tokens has the shade of the last one.
    """
    styles = shades(llm.config.model)
    if llm.tokenizer is None:
        raise CheckpointError("the demo needs a model with a tokenizer")
    text = Detokenizer(llm.tokenizer)
    layers: list[int] = []

    def show(piece: str) -> None:
        # Line by line, so that the shade ends with the text of the line.
        for line in piece.splitlines(keepends=True):
            console.print(Text(line.rstrip("\n"), style=styles[layers[-1]]), end="", soft_wrap=True)
            if line.endswith("\n"):
                console.print()

    for delta in begun(llm.stream(prompt, params), lambda: llm.engine.runner.decode_program_for([params]), []):
        for token, layer in zip(delta.token_ids, delta.exit_layers, strict=True):
            layers.append(layer)
            show(text.append(token))
    show(text.finish())
    console.print()
    return layers


def describe_depth(layers: Sequence[int], n_layers: int) -> str:
    """One answer's mean exit layer. Its first token, from prefill at full depth, is not counted."""
    decoded = layers[1:]
    if not decoded:
        return "  [one token, from prefill]"
    mean = sum(decoded) / len(decoded)
    return f"  [{len(layers)} tokens, mean exit layer {mean:.1f} of {n_layers}]"


def run_once(llm: LLM, prompts: Sequence[PromptLike], params: SamplingParams) -> Run:
    """Answer the prompts one after the other. A prompt that cannot be answered raises its error."""
    before = llm.stats()
    outputs = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts]
    after = llm.stats()
    seconds = 0.0
    for output in outputs:
        m = output.metrics
        if m is not None and m.first_token_time is not None and m.finish_time is not None:
            seconds += m.finish_time - m.first_token_time
    return Run(
        tuple(outputs),
        seconds,
        after.blocks_run - before.blocks_run,
        after.blocks_full_depth - before.blocks_full_depth,
    )


def _timed(llm: LLM, prompts: Sequence[PromptLike], params: SamplingParams, repeats: int) -> dict[str, list[Run]]:
    modes = {"full depth": replace(params, early_exit=None), "early exit": params}
    runs: dict[str, list[Run]] = {name: [] for name in modes}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("timing", total=(repeats + 1) * len(modes))
        for round_number in range(repeats + 1):
            for name, one in modes.items():
                run = run_once(llm, prompts, one)
                if round_number:  # the first round compiles
                    runs[name].append(run)
                bar.advance(task)
    return runs


def _print_legend(console: Console, model: ModelConfig) -> None:
    legend = Text("Each token is shaded by the blocks it ran: ")
    for layer, style in sorted(shades(model).items()):
        legend.append(f" {layer} of {model.n_layers} " if layer < model.n_layers else f" all {layer} ", style)
        legend.append(" ")
    if console.color_system is None:
        legend = Text("Without colours, only each answer's mean exit layer is shown.")
    console.print(legend, soft_wrap=True)


def _print_table(console: Console, model: ModelConfig, runs: Mapping[str, Sequence[Run]]) -> None:
    first = {name: one[0] for name, one in runs.items()}
    full, early = first["full depth"], first["early exit"]
    rates = {name: median(run.tokens_per_second for run in one) for name, one in runs.items()}
    found = agreement(full.answers, early.answers)
    table = Table()
    table.add_column()
    for name in first:
        table.add_column(name, justify="right")

    def mean_layer(run: Run) -> str:
        layers = [layer for answer in run.answers for layer in answer.exit_layers[1:]]
        return f"{sum(layers) / len(layers):.2f}" if layers else "-"

    table.add_row("tokens/s while decoding", *(f"{rate:.1f}" for rate in rates.values()))
    table.add_row("tokens decoded", *(f"{run.decoded}" for run in first.values()))
    table.add_row(f"mean exit layer, of {model.n_layers}", *map(mean_layer, first.values()))
    table.add_row("blocks run", *(f"{run.blocks}" for run in first.values()))
    table.add_row(
        "share of blocks skipped", *(f"{1 - run.blocks / max(1, run.blocks_full):.1%}" for run in first.values())
    )
    table.add_row("tokens equal to full depth, by position", "", f"{found.same_place:.1%}")
    table.add_row("tokens before the first difference", "", f"{found.before_first_difference:.1%}")
    table.add_row("answers equal as a whole", "", f"{found.whole:.1%}")
    console.print(table)
    faster = rates["early exit"] / rates["full depth"] if rates["full depth"] else 1.0
    console.print(
        f"Early exit decodes {faster:.2f}x as fast (medians of {len(runs['full depth'])} alternating rounds, one "
        "prompt at a time, greedy; without prefill and compilation).\nEach mode continues from its own tokens: after "
        "the first difference an answer may be as good and still share few positions, so both shares are given.",
        soft_wrap=True,
    )
