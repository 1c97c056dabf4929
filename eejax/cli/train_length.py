"""The command `eejax train-length`. Flags have the names of the fields they set; jax is imported inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from eejax.cli.flags import numbers
from eejax.cli.terminal import reported_errors
from eejax.core import ConfigError

if TYPE_CHECKING:
    from eejax.tune import LengthTarget

LABELS, TRAINING = "Labels", "Training"


def train_length(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Checkpoint or Hugging Face folder.", show_default=False)
    ],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to answer; may be repeated: .jsonl or .jsonl.gz with prompt, or instruction and input, and "
            "perhaps source; or one per line.",
            rich_help_panel=LABELS,
            show_default=False,
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(help="Prompts to use, equally many of each file.", rich_help_panel=LABELS, show_default=False),
    ] = None,
    temperatures: Annotated[
        str,
        typer.Option(
            metavar="T[,T]",
            help="Answer at each, and twice at the middle one.",
            rich_help_panel=LABELS,
        ),
    ] = "0.3,0.7,1.0",
    max_tokens: Annotated[int, typer.Option(help="Answer tokens at most.", rich_help_panel=LABELS)] = 512,
    labels_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the labels to this file while they are made.",
            rich_help_panel=LABELS,
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Use these labels, made earlier, instead of prompts.",
            rich_help_panel=LABELS,
            show_default=False,
        ),
    ] = None,
    hold_out: Annotated[
        float, typer.Option(help="Share of the prompts to measure on.", rich_help_panel=TRAINING)
    ] = 0.2,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="every: quantiles of all answers' lengths; max: of the longest answer to each prompt.",
            rich_help_panel=TRAINING,
        ),
    ] = "every",
    seed: Annotated[int, typer.Option(help="Seed of prompts, split and answers.", rich_help_panel=TRAINING)] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the report here.", show_default=False),
    ] = None,
) -> None:
    """Train predictors of the length of a model's answers, and store them beside its weights, for the scheduler."""
    with reported_errors():
        from eejax.tune import length_training

        report, file = length_training.train_length(
            path,
            prompts or (),
            labels=labels,
            labels_out=labels_out,
            options=length_training.LengthOptions(
                num_prompts=num_prompts,
                temperatures=numbers("--temperatures", temperatures),
                max_tokens=max_tokens,
                hold_out=hold_out,
                target=cast("LengthTarget", target),  # any other is refused there
                seed=seed,
            ),
        )
        if json_file is not None:
            try:
                json_file.write_text(json.dumps(report, indent=1) + "\n")
            except OSError as error:
                raise ConfigError(f"cannot write {json_file}: {error.strerror or error}") from error
        print_report(report)
        Console(stderr=True, highlight=False).print(f"wrote {file}", style="dim", soft_wrap=True)


def print_report(report: dict[str, Any]) -> None:
    """What `eejax.tune.length_training.train_length` reports, a table for each source and one for all."""
    console = Console(highlight=False)
    held_out, learnt = report["held_out_prompts"], report["training_prompts"]
    console.print(f"{held_out} of {held_out + learnt} prompts held out; when asked for a length, the model named one ")
    console.print(f"{report['numbers_said']} times. Errors are in tokens; in 50: share with an error of at most 50")
    for source, rows in report["evaluation"].items():
        table = Table(title=source, title_justify="left")
        table.add_column("predictor")
        for name in ("mean error", "in 50", "in 100", "in 2x", "Spearman", "pinball"):
            table.add_column(name, justify="right")
        for predictor, found in rows.items():
            rank = found["spearman"]
            table.add_row(
                predictor,
                f"{found['mean_error']:.1f}",
                *(f"{found[name]:.0%}" for name in ("acc_50", "acc_100", "within_2x")),
                "–" if rank is None else f"{rank:.2f}",
                f"{found['pinball']:.3f}",
            )
        console.print(table)
