"""The demo model's sizes, and one training run: parameters, optimiser, data position, and what is done to them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import demo_data
from checkpoints.demo_card import write_card
from checkpoints.demo_objective import CONFIDENCES, Numerics, Objective, exit_scores, loss_and_grads
from checkpoints.demo_optimiser import demo_optimiser
from eejax.core import ExitConfig, ModelConfig, replacing_folder
from eejax.model import init_params, load_tree, save_tree, write_checkpoint
from eejax.text import CONFIG_FILE, MODEL_FILE, load_tokenizer


def _model(
    hidden: int, intermediate: int, heads: int, kv_heads: int, layers: int, exits: tuple[int, ...], vocab: int
) -> ModelConfig:
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


DEFAULT_OBJECTIVE = Objective()


@dataclass(frozen=True)
class Preset:
    """A size of model and how it is trained. `rows` of `length` tokens make a batch."""

    model: ModelConfig
    rows: int
    length: int = 512
    peak_rate: float = 2e-3
    warmup: float = 0.02
    muon_ratio: float = 10.0
    weight_decay: float = 0.1
    clip: float = 1.0
    lm_share: float = 0.25
    objective: Objective = DEFAULT_OBJECTIVE


PRESETS = {
    "cpu": Preset(_model(256, 704, 4, 2, 12, (4, 8), 4096), rows=4),
    "gpu": Preset(_model(320, 768, 5, 5, 12, (4, 8), 4096), rows=64, peak_rate=3e-3),
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


def learning_rate(preset: Preset, done: float) -> float:
    """Rate after the share `done` of the budget: a linear warm-up, then a straight line to zero."""
    return preset.peak_rate * min(done / preset.warmup, 1.0) * max(1.0 - done, 0.0)


class Trainer:
    """Parameters, optimiser and data position, and what is done to them."""

    def __init__(self, preset: Preset, data: Path, work: Path, seed: int, dtype: Any) -> None:
        self.preset, self.data, self.work = preset, data, work
        serial = jax.default_backend() == "cpu"
        self.numerics = Numerics(dtype, serial, chunk=min(256, preset.length) if serial else 1024)
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
        self.optimiser = demo_optimiser(dtype, preset.clip, preset.weight_decay, preset.muon_ratio)
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
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of an integer step count
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
        """`score` of every set's `split` that has text."""
        report: dict[str, dict] = {}
        for name in (*demo_data.INSTRUCT, *demo_data.LM_TEXT, *demo_data.MEASURE_ONLY):
            if scores := self.score(self.documents(name, split), batches):
                report[name] = scores
        return report

    def score(self, documents: demo_data.Documents, batches: int | None) -> dict | None:
        """Bits per byte and agreement with the last exit, per exit, on at most `batches` batches of the documents.

        None where there is no text.
        Only answers are scored, given their questions; plain text is scored whole.
        """
        sizes = demo_data.bytes_per_token(self.work / "tokenizer")
        points = [str(point) for point in self.preset.model.exit_points]
        order = [(0, int(i)) for i in np.random.default_rng(0).permutation(len(documents))]
        sums: dict[str, Any] = {"nll": 0.0, "tokens": 0.0, "agree": 0.0}
        n_bytes = 0.0
        for batch in islice(demo_data.pack([documents], order, self.preset.rows, self.preset.length), batches):
            scores = jax.device_get(self._scores(self.params, batch))
            sums = {key: sums[key] + scores[key].astype(np.float64) for key in sums}
            n_bytes += float(sizes[batch["targets"][batch["weights"] == 1]].sum())
        if n_bytes == 0:
            return None
        report: dict[str, Any] = {"bytes": int(n_bytes), "tokens": int(sums["tokens"][0, 0]), "exits": {}}
        for e, point in enumerate(points):
            sure = {
                f"at_{confidence:g}": {
                    "share": float(sums["tokens"][e, c] / sums["tokens"][e, 0]),
                    "agreement": float(sums["agree"][e, c] / max(sums["tokens"][e, c], 1.0)),
                }
                for c, confidence in enumerate(CONFIDENCES)
            }
            report["exits"][point] = {"bits_per_byte": float(sums["nll"][e] / math.log(2) / n_bytes), **sure}
        return report

    def export(self, folder: Path, metrics: dict) -> None:
        """Write a complete checkpoint folder: weights in bfloat16, tokenizer, metrics and model card."""
        with replacing_folder(folder) as temporary:
            write_checkpoint(temporary, self.preset.model, self.params, jnp.bfloat16)
            for name in (MODEL_FILE, CONFIG_FILE):
                shutil.copyfile(self.work / "tokenizer" / name, temporary / name)
            (temporary / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
            write_card(temporary, metrics)
