"""Train the demo model, a small decoder with exits: on a CPU in an hour or two, on a GPU in minutes.

    python checkpoints/train_demo.py --data DIR --out checkpoints/demo --minutes 90

The work folder holds the tokenised text, the training state (`--resume` goes on from it) and, while training runs, an
export that is a complete checkpoint folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if not __package__:  # run as a file: python then looks for modules beside it, not in the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import demo_data
from checkpoints.demo_trainer import PRESETS, Trainer
from eejax.model import count_params


def fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 at least 1.5 times faster than float32; measured on a CPU."""
    if jax.default_backend() != "cpu":
        return True

    def seconds(dtype: Any) -> float:
        a = jnp.ones((1024, 512), dtype)
        dot = jax.jit(lambda a: jax.lax.dot_general(a, a, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32))
        dot(a).block_until_ready()
        times = []
        for _ in range(8):
            start = time.perf_counter()
            dot(a).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(jnp.float32) > 1.5 * seconds(jnp.bfloat16)


def choose_dtype(name: str) -> Any:
    """Dtype of matrix products that `--dtype` names.

    Raises:
        typer.BadParameter: it is none of them.
    """
    if name not in ("auto", "bfloat16", "float32"):
        raise typer.BadParameter(f"--dtype must be auto, bfloat16 or float32, got {name!r}")
    low = fast_bfloat16() if name == "auto" else name == "bfloat16"
    return jnp.bfloat16 if low else jnp.float32


def summary(trainer: Trainer, preset_name: str, finished: bool, split: str, evaluation: dict) -> dict:
    """What `metrics.json` holds."""
    preset, at = trainer.preset, trainer.at
    return {
        "finished": finished,
        "preset": preset_name,
        "parameters": count_params(trainer.params),
        "model": preset.model.to_dict(),
        "training": {
            "steps": at.step,
            "tokens": at.tokens,
            "rounds": at.position[0],
            "minutes": round(at.seconds / 60, 1),
            "tokens_per_second": round(at.tokens / max(at.seconds, 1e-9)),
            "rows": preset.rows,
            "length": preset.length,
            "peak_rate": preset.peak_rate,
            "weight_decay": preset.weight_decay,
            "lm_share": preset.lm_share,
            "prompt_weight": demo_data.PROMPT_WEIGHT,
            "exit_weights": preset.objective.exit_weights,
            "distill": preset.objective.distill,
            "dtype": jnp.dtype(trainer.numerics.dtype).name,
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count() if jax.default_backend() == "cpu" else None,
        },
        "split": split,
        "evaluation": evaluation,
    }


def train(
    trainer: Trainer,
    *,
    name: str,
    steps: int | None,
    minutes: float | None,
    export_minutes: float,
    stop_after: int | None,
) -> None:
    """Train until the budget is spent, saving and exporting to the work folder along the way.

    Args:
        steps, minutes: the budget; one of the two. The learning rate follows the share of it that is spent.
        export_minutes: time between two exports; the first comes after half of it.
        stop_after: stop at this step although the budget is not spent, saving the state.
    """
    at = trainer.at
    spent = lambda: at.step / steps if steps else at.seconds / (60 * (minutes or 1))  # noqa: E731
    console = Console()
    columns = (
        TextColumn("{task.percentage:5.1f}%"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    clock, next_save, next_export = time.monotonic(), at.seconds + 120, at.seconds + 30 * export_minutes
    before: tuple[int, float] = (at.tokens, at.seconds)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=1.0)
        for following, batch in trainer.stream.batches(at.position):
            if spent() >= 1 or at.step == stop_after:
                break
            losses = trainer.step(batch, spent()).tolist()
            at.position = following
            now = time.monotonic()
            at.seconds, clock = at.seconds + now - clock, now
            rate = (at.tokens - before[0]) / max(at.seconds - before[1], 1e-9)
            shown = " ".join(f"{loss:.3f}" for loss in losses)
            bar.update(task, completed=spent(), description=f"step {at.step}, loss {shown}, {rate:,.0f} tokens/s")
            if at.step % 20 == 0:
                before = (at.tokens, at.seconds)
                if not console.is_terminal:
                    line = f"{spent():6.1%} step {at.step} round {at.position[0]} loss {shown} {rate:,.0f} tokens/s"
                    console.print(line, highlight=False)
            if at.seconds >= next_save:
                trainer.save()
                next_save = at.seconds + 120
            if at.seconds >= next_export:
                evaluation = trainer.evaluate("validation", 4)
                trainer.export(trainer.work / "export", summary(trainer, name, False, "validation", evaluation))
                next_export = at.seconds + 60 * export_minutes
                console.print(
                    json.dumps(
                        {s: [round(e["bits_per_byte"], 3) for e in v["exits"].values()] for s, v in evaluation.items()}
                    )
                )
    trainer.save()


def main(
    data: Annotated[Path, typer.Option(help="Folder with instruct/ and lm_text/.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; replaced whole.")],
    work: Annotated[Path, typer.Option(help="Folder for cached text, training state and exports.")] = Path(".train"),
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "cpu",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget in minutes of training.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Budget in steps.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the state in the work folder, if there is one.")] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of matrix products: auto, bfloat16 or float32.")] = "auto",
    export_minutes: Annotated[
        float, typer.Option(min=0.01, help="Minutes between two exports to the work folder.")
    ] = 10,
    eval_batches: Annotated[
        int | None, typer.Option(min=1, help="Batches of each set in the last evaluation; all when not given.")
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop at this step, without an export, to be resumed.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the demo model and write its checkpoint folder."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if (minutes is None) == (steps is None):
        raise typer.BadParameter("give --minutes or --steps, and not both")
    trainer = Trainer(PRESETS[preset], data, work, seed, choose_dtype(dtype))
    if resume and (work / "state").exists():
        trainer.resume()
    kind = jnp.dtype(trainer.numerics.dtype).name
    print(f"{count_params(trainer.params):,} parameters, {kind}, step {trainer.at.step}", flush=True)
    train(trainer, name=preset, steps=steps, minutes=minutes, export_minutes=export_minutes, stop_after=stop_after)
    if stop_after is not None and trainer.at.step == stop_after:
        return
    evaluation = trainer.evaluate("validation", eval_batches)
    trainer.export(out, summary(trainer, preset, True, "validation", evaluation))
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    typer.run(main)
