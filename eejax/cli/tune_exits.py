"""The command `eejax tune-exits`. Flags have the names of the fields they set; jax is imported inside the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from eejax.cli.flags import integers
from eejax.cli.terminal import reported_errors

if TYPE_CHECKING:
    from eejax.core import ExitHeadKind

EXITS, TRAINING, EVALUATION = "Exits", "Training", "Evaluation"


def tune_exits(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Checkpoint or Hugging Face folder.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Training text: .txt with blank lines between documents; .jsonl or .jsonl.gz with text, "
            "prompt and response, instruction and output, or messages.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write. \\[default: PATH-exits]", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    exit_layers: Annotated[
        str | None,
        typer.Option(
            metavar="E[,E]",
            help="Blocks after which there are exits. \\[default: the model's own, or each quarter of its depth]",
            rich_help_panel=EXITS,
        ),
    ] = None,
    exit_head: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="shared, norm or mlp. \\[default: the model's own, or norm]",
            rich_help_panel=EXITS,
        ),
    ] = None,
    tie_output: Annotated[
        bool | None,
        typer.Option(
            "--tie-output/--untie-output",
            help="Exits share the LM head's matrix, or each has its own. \\[default: the model's own, or tied]",
            rich_help_panel=EXITS,
            show_default=False,
        ),
    ] = None,
    probes: Annotated[
        bool | None,
        typer.Option(
            "--probes/--no-probes",
            help="Train a linear probe for every exit, the classifier measure. \\[default: probes]",
            rich_help_panel=EXITS,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            help="Steps for the heads, and as many for the probes; 0 evaluates only.", rich_help_panel=TRAINING
        ),
    ] = 300,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.", rich_help_panel=TRAINING)] = 4096,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a document in one row. \\[default: 512]", rich_help_panel=TRAINING),
    ] = None,
    lr: Annotated[
        float,
        typer.Option(help="Peak learning rate, relative to the size of what is trained.", rich_help_panel=TRAINING),
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Seed of held-out documents and order.", rich_help_panel=TRAINING)] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16 or float16 for the backbone; by default float32 on CPU, else bfloat16.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    eval_share: Annotated[
        float, typer.Option(help="Share of the documents to hold out.", rich_help_panel=EVALUATION)
    ] = 0.05,
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to evaluate on; then nothing is held out.", rich_help_panel=EVALUATION),
    ] = None,
) -> None:
    """Give a model exits, or tune those it has, and write a new checkpoint; the backbone is not changed."""
    with reported_errors():
        from eejax.tune import exit_tuning

        report, folder = exit_tuning.tune_exits(
            path,
            data,
            out=out,
            overwrite=overwrite,
            exits=exit_tuning.ExitChoice(
                layers=integers("--exit-layers", exit_layers),
                head=cast("ExitHeadKind | None", exit_head),  # any other is refused there
                tie_output=tie_output,
                probes=probes,
            ),
            eval_data=eval_data,
            options=exit_tuning.TuningOptions(
                steps=steps,
                batch_tokens=batch_tokens,
                seq_len=seq_len,
                lr=lr,
                eval_share=eval_share,
                seed=seed,
                dtype=dtype,
            ),
            progress=sys.stderr.isatty(),
        )
        print_report(report["evaluation"])
        if folder is not None:
            Console(stderr=True, highlight=False).print(f"wrote {folder}", style="dim", soft_wrap=True)


def print_report(evaluation: dict[str, Any]) -> None:
    """Print the evaluation, as `exit_tuning.json` holds it, in tables."""
    before, after = evaluation["before"], evaluation.get("after")
    last = after or before
    exits = Table(
        title=f"{evaluation['documents']} documents held out, {evaluation['tokens']:,} tokens", title_justify="left"
    )
    for name in ("exit", "agreement with full depth", "bits per byte"):
        exits.add_column(name, justify="right")
    for layer, found in last["exits"].items():
        old = before["exits"][layer]
        exits.add_row(
            layer,
            _change(old["agreement"], found["agreement"], ".2%", after is not None),
            _change(old["bits_per_byte"], found["bits_per_byte"], ".4f", after is not None),
        )
    exits.add_row("full depth", "", f"{last['full_depth']['bits_per_byte']:.4f}", style="dim")
    sure = Table(title="tokens that reach a threshold, and how many of those agree", title_justify="left")
    for name in ("exit", "measure", "AUROC"):
        sure.add_column(name, justify="right")
    rows = [(layer, *item) for layer, found in last["exits"].items() for item in found["confidence"].items()]
    for threshold in rows[0][2]["at"]:
        sure.add_column(f"at {threshold}", justify="right")
    for layer, measure, found in rows:
        cells = [f"{at['coverage']:.1%}, {_share(at['agreement'])}" for at in found["at"].values()]
        sure.add_row(layer, measure, "–" if found["auroc"] is None else f"{found['auroc']:.3f}", *cells)
    console = Console(highlight=False)
    console.print(exits)
    console.print(sure)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _change(old: float, new: float, form: str, tuned: bool) -> str:
    return f"{old:{form}} → {new:{form}}" if tuned else f"{old:{form}}"
