"""Train the demo model: a small decoder with exits after blocks 4 and 8, on a CPU in an hour or two, on a GPU in minutes.

    python checkpoints/train_demo.py --data DIR --out checkpoints/demo --minutes 90

The work folder holds the tokenised text, the training state (`--resume` goes on from it) and, while training runs, an
export that is a complete checkpoint folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import demo_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from demo_card import write_card
from demo_objective import CONFIDENCES, Numerics, Objective, exit_scores, loss_and_grads
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from eejax.config import ExitConfig, ModelConfig
from eejax.model import count_params, init_params
from eejax.tokenizer import CONFIG_FILE, MODEL_FILE, load_tokenizer
from eejax.weights import load_tree, replacing_folder, save_tree, write_checkpoint


def _model(hidden: int, intermediate: int, heads: int, kv_heads: int, layers: int, exits: tuple[int, ...], vocab: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=64,
        max_position=1024,
        tie_embeddings=True,
        exits=ExitConfig(layers=exits, head="shared"),
    )


@dataclass(frozen=True)
class Preset:
    """A size of model and how it is trained. `rows` of `length` tokens make a batch."""

    model: ModelConfig
    rows: int
    length: int = 512
    peak_rate: float = 2e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    clip: float = 1.0
    lm_share: float = 0.25
    objective: Objective = Objective()


PRESETS = {
    "cpu": Preset(_model(256, 704, 4, 2, 12, (4, 8), 4096), rows=8),
    "gpu": Preset(_model(320, 896, 5, 5, 12, (4, 8), 4096), rows=64, peak_rate=3e-3),
    "tiny": Preset(
        _model(64, 128, 2, 1, 3, (1, 2), 320), rows=2, length=64, objective=Objective(exit_weights=(0.2, 0.3, 0.5))
    ),
}


@dataclass
class Progressed:
    """How far training is: what a resumed run needs besides the arrays."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    position: tuple[int, int] = (0, 0)


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


def learning_rate(preset: Preset, done: float) -> float:
    """Rate after the share `done` of the budget: a linear warm-up, then a straight line to zero."""
    return preset.peak_rate * min(done / preset.warmup, 1.0) * max(1.0 - done, 0.0)


class Trainer:
    """Parameters, optimiser and data position, and what is done to them."""

    def __init__(self, preset: Preset, data: Path, work: Path, seed: int, dtype: Any) -> None:
        self.preset, self.data, self.work = preset, data, work
        serial = jax.default_backend() == "cpu"
        self.numerics = Numerics(dtype, serial, chunk=min(128, preset.length) if serial else 1024)
        self._prepare_tokenizer()
        self.tokenizer = load_tokenizer(work / "tokenizer")
        load = self.documents
        self.stream = demo_data.TrainingData(
            [load(name, "train") for name in demo_data.INSTRUCT],
            [load(name, "train") for name in demo_data.LM_TEXT],
            preset.rows,
            preset.length,
            preset.lm_share,
            seed,
        )
        self.params = init_params(preset.model, seed)
        # Norm gains are vectors and are not decayed.
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(preset.clip),
            optax.scale_by_adam(b1=0.9, b2=0.95),
            optax.add_decayed_weights(preset.weight_decay, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
        )
        self.moments = self.optimiser.init(self.params)
        self.at = Progressed()
        self._update = jax.jit(self._step, donate_argnums=(0, 1))
        self._scores = jax.jit(lambda params, batch: exit_scores(preset.model, self.numerics, params, batch))

    def _prepare_tokenizer(self) -> None:
        folder = self.work / "tokenizer"
        if not folder.exists():
            with replacing_folder(folder) as temporary:
                demo_data.train_tokenizer(self.data, temporary, self.preset.model.vocab_size)

    def documents(self, name: str, split: str) -> demo_data.Documents:
        """The tokenised documents of one set."""
        file = self.work / "tokenizer" / MODEL_FILE
        return demo_data.load_documents(self.data, self.work / "cache", file, self.tokenizer, name, split)

    def _step(self, params: dict, moments: Any, batch: dict, rate: jax.Array) -> tuple[dict, Any, jax.Array]:
        losses, grads = loss_and_grads(self.preset.model, self.preset.objective, self.numerics, params, batch)
        updates, moments = self.optimiser.update(grads, moments, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), moments, losses

    def step(self, batch: dict[str, np.ndarray], done: float) -> jax.Array:
        """Learn from one batch when the share `done` of the budget is spent. Returns the loss of each exit."""
        rate = jnp.float32(learning_rate(self.preset, done))
        self.params, self.moments, losses = self._update(self.params, self.moments, batch, rate)
        self.at.step += 1
        self.at.tokens += int(np.count_nonzero(batch["weights"]))
        return losses

    def _arrays(self) -> dict:
        leaves = jax.tree.leaves(self.moments)
        return {"params": self.params, "moments": {str(i): leaf for i, leaf in enumerate(leaves)}}

    def save(self) -> None:
        """Write the training state to the work folder, replacing the last one."""
        with replacing_folder(self.work / "state") as folder:
            save_tree(folder / "arrays", self._arrays())
            (folder / "progress.json").write_text(json.dumps(asdict(self.at)))

    def resume(self) -> None:
        """Go on from the state in the work folder."""
        folder = self.work / "state"
        arrays = load_tree(folder / "arrays", self._arrays())
        self.params = arrays["params"]
        leaves = [arrays["moments"][str(i)] for i in range(len(arrays["moments"]))]
        self.moments = jax.tree.unflatten(jax.tree.structure(self.moments), leaves)
        progress = json.loads((folder / "progress.json").read_text())
        self.at = Progressed(**progress | {"position": tuple(progress["position"])})

    def evaluate(self, split: str, batches: int | None) -> dict[str, dict]:
        """Bits per byte and agreement with the last exit, per set and exit, on at most `batches` batches of each set.

        Only answers are scored, given their questions; plain text is scored whole.
        """
        sizes = demo_data.bytes_per_token(self.work / "tokenizer")
        points = [str(point) for point in self.preset.model.exit_points]
        report: dict[str, dict] = {}
        for name in (*demo_data.INSTRUCT, *demo_data.LM_TEXT, *demo_data.MEASURE_ONLY):
            documents = self.documents(name, split)
            order = [(0, int(i)) for i in np.random.default_rng(0).permutation(len(documents))]
            sums: dict[str, Any] = {"nll": 0.0, "tokens": 0.0, "agree": 0.0}
            n_bytes = 0.0
            for number, batch in enumerate(demo_data.pack([documents], order, self.preset.rows, self.preset.length)):
                if batches is not None and number >= batches:
                    break
                scores = jax.device_get(self._scores(self.params, batch))
                sums = {key: sums[key] + scores[key].astype(np.float64) for key in sums}
                n_bytes += float(sizes[batch["targets"][batch["weights"] == 1]].sum())
            if n_bytes == 0:
                continue
            report[name] = {"bytes": int(n_bytes), "tokens": int(sums["tokens"][0, 0]), "exits": {}}
            for e, point in enumerate(points):
                sure = {
                    f"at_{confidence:g}": {
                        "share": float(sums["tokens"][e, c] / sums["tokens"][e, 0]),
                        "agreement": float(sums["agree"][e, c] / max(sums["tokens"][e, c], 1.0)),
                    }
                    for c, confidence in enumerate(CONFIDENCES)
                }
                report[name]["exits"][point] = {"bits_per_byte": float(sums["nll"][e] / math.log(2) / n_bytes), **sure}
        return report

    def export(self, folder: Path, metrics: dict) -> None:
        """Write a complete checkpoint folder: weights in bfloat16, tokenizer, metrics and model card."""
        with replacing_folder(folder) as temporary:
            write_checkpoint(temporary, self.preset.model, self.params, jnp.bfloat16)
            for name in (MODEL_FILE, CONFIG_FILE):
                shutil.copyfile(self.work / "tokenizer" / name, temporary / name)
            (temporary / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
            write_card(temporary, metrics)


def describe(trainer: Trainer, preset_name: str, finished: bool, split: str, evaluation: dict) -> dict:
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
    trainer: Trainer, *, name: str, steps: int | None, minutes: float | None, export_minutes: float, stop_after: int | None
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
    columns = (TextColumn("{task.percentage:5.1f}%"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
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
                trainer.export(trainer.work / "export", describe(trainer, name, False, "validation", evaluation))
                next_export = at.seconds + 60 * export_minutes
                console.print(json.dumps({s: [round(e["bits_per_byte"], 3) for e in v["exits"].values()] for s, v in evaluation.items()}))
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
    export_minutes: Annotated[float, typer.Option(min=0.01, help="Minutes between two exports to the work folder.")] = 10,
    eval_batches: Annotated[int | None, typer.Option(min=1, help="Batches of each set in the last evaluation; all when not given.")] = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop at this step, without an export, to be resumed.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the demo model and write its checkpoint folder."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if dtype not in ("auto", "bfloat16", "float32"):
        raise typer.BadParameter(f"--dtype must be auto, bfloat16 or float32, got {dtype!r}")
    if (minutes is None) == (steps is None):
        raise typer.BadParameter("give --minutes or --steps, and not both")
    low = fast_bfloat16() if dtype == "auto" else dtype == "bfloat16"
    trainer = Trainer(PRESETS[preset], data, work, seed, jnp.bfloat16 if low else jnp.float32)
    if resume and (work / "state").exists():
        trainer.resume()
    print(f"{count_params(trainer.params):,} parameters, {jnp.dtype(trainer.numerics.dtype).name}, step {trainer.at.step}", flush=True)
    train(trainer, name=preset, steps=steps, minutes=minutes, export_minutes=export_minutes, stop_after=stop_after)
    if stop_after is not None and trainer.at.step == stop_after:
        return
    evaluation = trainer.evaluate("validation", eval_batches)
    trainer.export(out, describe(trainer, preset, True, "validation", evaluation))
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    typer.run(main)
