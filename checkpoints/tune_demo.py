"""Tune the demo model so that its exits pay: all blocks learn, on documents and on answers of the model's own.

    python checkpoints/tune_demo.py --data DIR --checkpoint FOLDER --out FOLDER

begins with what `train_demo.py` wrote. `demo_tuning.py` says what is learnt. Length heads and calibrated thresholds
belong to weights: what stood beside the old ones is not carried over.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console

if not __package__:  # run as a file: python then looks for modules beside it, not in the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import demo_data
from checkpoints.demo_objective import Numerics
from checkpoints.demo_optimiser import demo_optimiser
from checkpoints.demo_trainer import PRESETS, Trainer
from checkpoints.demo_tuning import (
    MARGINS,
    STAGES,
    Stage,
    draw_thresholds,
    exit_params,
    mean_weights,
    new_probes,
    tuning_loss_and_grads,
)
from checkpoints.train_demo import choose_dtype
from eejax import LLM, SamplingParams
from eejax.core import ModelConfig
from eejax.model import check_target, count_params, leaves, load_checkpoint
from eejax.serve import fingerprint
from eejax.text import CONFIG_FILE, MODEL_FILE, Tokenizer, prompt_ids

PROMPT_SHARES = {"oasst1_en": 0.4, "gsm8k": 0.2, "simple_instructions": 0.2, "tldr": 0.2}
LONGEST_PROMPT = 400
LM_SHARE = 0.1
WARM_UP_STEPS = 30
WEIGHT_DECAY = 0.01
SAY_EVERY = 20


def own_answers(
    model: ModelConfig, params: dict, tokenizer: Tokenizer, data: Path, split: str, count: int, max_tokens: int
) -> demo_data.Documents:
    """Greedy answers at full depth to about `count` questions of a split, each after its question."""
    llm = LLM.from_params(
        model, params, tokenizer=tokenizer, eos_id=tokenizer.eos_id, max_model_len=LONGEST_PROMPT + max_tokens
    )
    prompts: list[list[int]] = []
    for name, share in PROMPT_SHARES.items():
        rows = demo_data.read_rows(data / "instruct" / name / f"{split}.jsonl.gz")
        for i in np.random.default_rng(1).permutation(len(rows))[: round(count * share)]:
            ids = prompt_ids(tokenizer, demo_data.question(rows[i]))
            if len(ids) <= LONGEST_PROMPT:
                prompts.append(ids)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0, max_tokens=max_tokens)
    )
    answers = [output.outputs[0].token_ids for output in outputs]
    return demo_data.joined(zip(prompts, answers, strict=True))


class Tuner:
    """Parameters and probes, and what a stage makes of them.

    Args:
        model: with `shared` exits and without probes.
        params: the model before tuning.
    """

    def __init__(self, model: ModelConfig, numerics: Numerics, params: dict) -> None:
        self.model, self.numerics = model, numerics
        self.untuned, self.params, self.probes = params, params, new_probes(model)

    def checkpoint_params(self) -> dict:
        """Parameters with the probes among them, as they are stored."""
        return self.params | {"exits": exit_params(self.model, self.probes)}

    def run(
        self, stage: Stage, batches: Iterator[tuple[dict, bool]], rng: np.random.Generator, console: Console
    ) -> dict[str, Any]:
        """Learn from the next batches (each with whether it holds own answers). Returns what `metrics.json` says."""
        muon = demo_optimiser(self.numerics.dtype, clip=1.0, weight_decay=WEIGHT_DECAY, muon_ratio=10.0)
        adam = optax.scale_by_adam(b1=0.9, b2=0.95)

        @functools.partial(jax.jit, donate_argnums=0)
        def update(state: tuple, untuned: dict, batch: dict, rate: jax.Array) -> tuple[tuple, jax.Array]:
            params, probes, moments, probe_moments = state
            seen, grads, d_probes = tuning_loss_and_grads(
                self.model, stage, self.numerics, params, probes, untuned, batch
            )
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of an integer step count
                updates, moments = muon.update(grads, moments, params)
                probe_updates, probe_moments = adam.update(d_probes, probe_moments, probes)
            params, probes = jax.tree.map(lambda p, u: p - rate * u, (params, probes), (updates, probe_updates))
            return (params, probes, moments, probe_moments), seen

        learnt = jax.tree.map(jnp.copy, (self.params, self.probes))
        state: Any = (*learnt, muon.init(learnt[0]), adam.init(learnt[1]))
        tokens, started, seen = 0, time.monotonic(), np.zeros((2, len(self.model.exit_points), 3))
        for number, (batch, own) in enumerate(itertools.islice(batches, stage.steps)):
            rate = stage.peak_rate * min((number + 1) / WARM_UP_STEPS, 1.0) * (1 - number / stage.steps)
            more = {"thresholds": draw_thresholds(batch, rng), "own": np.float32(own)}
            state, found = update(state, self.untuned, batch | more, jnp.float32(rate))
            seen[int(own)] += np.asarray(found)
            tokens += int(np.count_nonzero(batch["weights"]))
            if (number + 1) % SAY_EVERY == 0:
                for kind, (of, agree, _) in zip(("documents", "own answers"), seen.transpose(0, 2, 1), strict=True):
                    says = ", ".join(f"{a / max(n, 1):.1%} of {n:.0f}" for n, a in zip(of, agree, strict=True))
                    console.print(f"step {number + 1}, {kind}: as full depth at each exit: {says}", highlight=False)
                seen[:] = 0
        self.params, self.probes = mean_weights(self.untuned, state[0], stage.keep), state[1]
        minutes = (time.monotonic() - started) / 60
        return dataclasses.asdict(stage) | {"tokens": tokens, "minutes": round(minutes, 1)}


def choose_stages(
    names: str, steps: str | None, rates: str | None, keep: str | None, exits: int
) -> list[tuple[str, Stage]]:
    """Stages by name, with what the options change: one value for each, separated by commas.

    Raises:
        typer.BadParameter: an unknown stage, a list of another length, or a value that is no number or out of range.
    """
    chosen = names.split(",")
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        raise typer.BadParameter(f"no stages {unknown}; there are {', '.join(STAGES)}")
    if len(MARGINS) != exits:
        raise typer.BadParameter(f"the recipe is for a model with {len(MARGINS)} early exits, and this one has {exits}")

    def values(option: str, given: str | None, field: str, kind: type, most: float) -> list[Any]:
        if given is None:
            return [getattr(STAGES[name], field) for name in chosen]
        try:
            found = [kind(value) for value in given.split(",")]
        except ValueError:
            found = []
        if len(found) != len(chosen) or not all(0 < value <= most for value in found):
            raise typer.BadParameter(f"{option} must give {len(chosen)} numbers in (0, {most:g}], got {given!r}")
        return found

    per_stage = zip(
        chosen,
        values("--steps", steps, "steps", int, 1_000_000),
        values("--rates", rates, "peak_rate", float, 1),
        values("--keep", keep, "keep", float, 1),
        strict=True,
    )
    return [(name, dataclasses.replace(STAGES[name], steps=n, peak_rate=r, keep=k)) for name, n, r, k in per_stage]


def main(
    data: Annotated[Path, typer.Option(help="Folder with instruct/ and lm_text/.", exists=True, file_okay=False)],
    checkpoint: Annotated[Path, typer.Option(help="What train_demo.py wrote.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; replaced whole.")],
    work: Annotated[Path, typer.Option(help="Folder for cached text and answers.")] = Path(".train/tuning"),
    stages: Annotated[str, typer.Option(help=f"Any of {', '.join(STAGES)}, in order.")] = ",".join(STAGES),
    steps: Annotated[str | None, typer.Option(help="Steps of each stage.")] = None,
    rates: Annotated[str | None, typer.Option(help="Peak learning rate of each stage.")] = None,
    keep: Annotated[
        str | None, typer.Option(help="Share of what it learnt in the weights each stage ends with.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=10, help="Questions for the model's own answers.")] = 1200,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an own answer at most.")] = 192,
    eval_batches: Annotated[
        int | None, typer.Option(min=1, help="Batches of each set in the evaluation; all when not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of matrix products: auto, bfloat16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Tune the demo model and write its checkpoint folder: weights, probes, tokenizer, metrics and model card."""
    low = choose_dtype(dtype)
    file = checkpoint / "metrics.json"
    metrics: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if not metrics or "tuning" in metrics:
        was = "has been tuned already" if metrics else "has no metrics.json"
        raise typer.BadParameter(f"{checkpoint} {was}; begin with what train_demo.py wrote")
    check_target(checkpoint, out, overwrite=True)
    model, params = load_checkpoint(checkpoint)
    recipe = choose_stages(stages, steps, rates, keep, len(model.exits.layers))
    (work / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in (MODEL_FILE, CONFIG_FILE):
        shutil.copyfile(checkpoint / name, work / "tokenizer" / name)
    probed = dataclasses.replace(model, exits=dataclasses.replace(model.exits, probes=True))
    preset = dataclasses.replace(PRESETS[metrics["preset"]], model=probed, lm_share=LM_SHARE)
    trainer = Trainer(preset, data, work, seed, low)  # its data, its evaluation, its export
    tuner = Tuner(model, trainer.numerics, params)

    def answers(split: str, count: int) -> demo_data.Documents:
        """Of the model as it is now."""
        tag = fingerprint(leaves(tuner.params)).removeprefix("sha256:")[:12]
        make = functools.partial(own_answers, model, tuner.params, trainer.tokenizer, data, split, count, answer_tokens)
        return demo_data.kept(work / "cache", f"answers-{split}-{count}-{answer_tokens}-{tag}", make)

    def own_scores() -> dict | None:
        trainer.params = tuner.checkpoint_params()
        return trainer.score(answers(metrics["split"], max(prompts // 8, 10)), eval_batches)

    own = answers("train", prompts)
    own_stream = demo_data.TrainingData([own], [], preset.rows, preset.length, 0.0, seed)
    pairs = zip(trainer.stream.batches((0, 0)), own_stream.batches((0, 0)), strict=True)
    batches = ((batch, bool(kind)) for pair in pairs for kind, (_, batch) in enumerate(pair))
    tuning: dict[str, Any] = {
        "answers": len(own),
        "dtype": jnp.dtype(low).name,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count() if jax.default_backend() == "cpu" else None,
        "stages": [],
        "before": {"evaluation": metrics["evaluation"], "own_answers": own_scores()},
    }
    console, rng = Console(), np.random.default_rng(seed)
    for name, stage in recipe:
        console.print(f"stage {name}: {stage.steps} steps", highlight=False)
        tuning["stages"].append({"name": name, **tuner.run(stage, batches, rng, console)})
    tuning["own_answers"] = own_scores()
    trainer.params = tuner.checkpoint_params()
    metrics |= {
        "parameters": count_params(tuner.checkpoint_params()),
        "model": probed.to_dict(),
        "evaluation": trainer.evaluate(metrics["split"], eval_batches),
        "tuning": tuning,
    }
    trainer.export(out, metrics)
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    typer.run(main)
