"""The command `eejax calibrate`. Flags have the names of the fields they set; jax is imported inside the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eejax.cli.flags import flags_of, given, numbers, takes
from eejax.cli.terminal import reported_errors
from eejax.core import EngineOptions

if TYPE_CHECKING:
    from eejax.serve import Calibration

PROMISE, MODEL = "The promise", "Model"


@takes(flags_of(EngineOptions, MODEL, only=["exit_layers", "dtype", "max_num_seqs"]))
def calibrate(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Checkpoint or Hugging Face folder.", show_default=False)
    ],
    prompts: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Prompts to answer; may be repeated: .jsonl or .jsonl.gz with prompt, or instruction and input; or "
            "one per line.",
            show_default=False,
        ),
    ],
    max_risk: Annotated[
        float, typer.Option(help="Expected loss of a request at most.", rich_help_panel=PROMISE)
    ] = 0.02,
    confidence: Annotated[
        float, typer.Option(help="Probability with which that holds.", rich_help_panel=PROMISE)
    ] = 0.95,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="softmax, margin, similarity or classifier; may be repeated: each is calibrated separately. "
            "\\[default: softmax]",
            rich_help_panel=PROMISE,
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="agreement (share of tokens that full depth would not have chosen), rouge-l (1 - ROUGE-L with the "
            "full-depth answer) or exact (whether the answer differs).",
            rich_help_panel=PROMISE,
        ),
    ] = "agreement",
    grid: Annotated[
        str | None,
        typer.Option(metavar="T[,T]", help="Thresholds to test instead of the measure's own.", rich_help_panel=PROMISE),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Answer tokens at most.", rich_help_panel=PROMISE)] = 128,
    num_prompts: Annotated[
        int | None, typer.Option(help="Prompts to use, equally many of each file.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is stored, as one JSON object.")] = False,
    **flags: Any,
) -> None:
    """Find the lowest threshold that keeps the risk below a bound, and store it in the checkpoint.

    It holds for these exits and this dtype only.
    """
    with reported_errors():
        from eejax.tune import calibrator

        options = calibrator.CalibrationOptions(
            max_risk=max_risk,
            confidence=confidence,
            measures=tuple(measure or ("softmax",)),
            loss=loss,
            grid=None if grid is None else numbers("--grid", grid),
            max_tokens=max_tokens,
            num_prompts=num_prompts,
            seed=seed,
        )
        console = Console(stderr=True, highlight=False)
        calibration, file = calibrator.calibrate(
            path,
            prompts,
            options,
            **given(flags, EngineOptions),
            say=lambda line: console.print(line, style="dim", markup=False, soft_wrap=True),
        )
        if as_json:
            print(json.dumps(calibration.to_dict()))
        else:
            print_calibration(calibration, options.measures)
        console.print(f"wrote {file}", style="dim", soft_wrap=True)


def print_calibration(calibration: Calibration, measures: tuple[str, ...]) -> None:
    """Print a table of tests for each of `measures`, and the result."""
    console = Console(highlight=False)
    for name in measures:
        found = calibration.measures[name]
        table = Table(title=f"{name}: {found.num_prompts} prompts, loss {found.loss}", title_justify="left")
        for column in ("threshold", "mean exit layer", "risk", "p-value", ""):
            table.add_column(column, justify="right")
        rows = zip(found.grid, found.mean_exit_layers, found.risks, found.p_values, strict=False)
        for threshold, layer, risk, p in rows:
            kept = found.threshold is not None and threshold >= found.threshold
            table.add_row(f"{threshold:g}", f"{layer:.2f}", f"{risk:.4f}", f"{p:.2g}", "accepted" if kept else "")
        console.print(table)
        if found.threshold is None:
            text = f"No threshold can be certified: requests with a calibrated {name} threshold run at full depth."
        else:
            text = (
                f"With probability {found.confidence:g}, the expected loss at every tested threshold of at least "
                f"{found.threshold:g} is at most {found.max_risk:g}, in every batch."
            )
        console.print(text, soft_wrap=True)
