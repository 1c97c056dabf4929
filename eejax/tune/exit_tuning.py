"""Tune exits: give a model exits of its own, or better ones, without touching its backbone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from eejax.core import ExitConfig, ExitHeadKind, ModelConfig, replacing_folder, require, require_positive_int
from eejax.device import resolve_dtype
from eejax.model import (
    add_exits,
    check_target,
    leaves,
    load_checkpoint,
    load_config,
    load_lazily,
    param_shapes,
    rebuild,
    write_checkpoint,
)
from eejax.text import Tokenizer, copy_tokenizer, load_tokenizer
from eejax.tune.exit_tuner import Tuner, TuningOptions, import_optax
from eejax.tune.tuning_data import hold_out, read_documents, text_bytes

REPORT_FILE = "exit_tuning.json"


@dataclasses.dataclass(frozen=True, slots=True)
class ExitChoice:
    """The exits that are to be tuned. What is None is as the model has it; `choose_exits` says what else it may be.

    Attributes:
        layers: blocks that are followed by an exit.
        head: `shared`, `norm` or `mlp`.
        tie_output: exits share the LM head's matrix.
        probes: exits have probes, for the measure `classifier`.
    """

    layers: Sequence[int] | None = None
    head: ExitHeadKind | None = None
    tie_output: bool | None = None
    probes: bool | None = None


def choose_exits(model: ModelConfig, choice: ExitChoice) -> ModelConfig:
    """The model with the exits that are to be tuned.

    A model without exits gets `norm` heads after a quarter, a half and three quarters of its blocks. Exits get probes
    unless `choice.probes` is false.

    Raises:
        ConfigError: an exit layer does not exist, or exits of this kind cannot be tuned.
    """
    old, layers = model.exits, choice.layers
    head = choice.head if choice.head is not None else old.head if old.layers else "norm"
    require(head != "block", "exit heads of kind 'block' cannot be tuned; choose 'shared', 'norm' or 'mlp'")
    if layers is None:
        quarters = {round(model.n_layers * part / 4) for part in (1, 2, 3)}
        layers = old.layers or [layer for layer in quarters if 0 < layer < model.n_layers]
    require(bool(layers), f"a model of {model.n_layers} blocks has no place for an exit")
    for layer in layers:
        require_positive_int("ExitConfig", layers=layer)
    same = head == old.head and bool(old.layers)
    exits = ExitConfig(
        layers=tuple(sorted(set(layers))),
        head=head,
        norm=old.norm or not same,
        tie_output=choice.tie_output if choice.tie_output is not None else old.tie_output or not same,
        probes=choice.probes is not False,
    )
    new = [layer for layer in exits.layers if layer not in old.layers]
    require(exits.norm or not new, f"the model's exits have no norm, so none can be added after blocks {new}")
    return dataclasses.replace(model, exits=exits)


def start_exits(config: ModelConfig, model: ModelConfig, params: dict) -> dict:
    """Parameters of `model` with the exits of `config` in place of its own.

    An exit that `model` has already, of the same kind, starts from there; any other equals the shared head at first
    (`eejax.model.add_exits`), and its probe gives a confidence of one half.
    """
    _, added = add_exits(model, params, dataclasses.replace(config.exits, norm=True))
    have = dict(leaves(added))
    if config.exits.head == model.exits.head:
        have |= leaves({"exits": params.get("exits", {})})
    return rebuild(param_shapes(config), have)


def tune_exits(
    path: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    exits: ExitChoice | None = None,
    eval_data: str | Path | None = None,
    options: TuningOptions | None = None,
    progress: bool = False,
) -> tuple[dict[str, Any], Path | None]:
    """Tune the exits of the model in `path` on the text in `data`, and write it with them as a new checkpoint.

    The backbone stays as it is, to the bit. Heads learn the distribution of full depth (KL divergence), then probes
    learn whether the head's likeliest token is that of full depth (CALM, arXiv 2207.07061, sec. 3.3-3.5).

    Args:
        path: an eejax checkpoint or a Hugging Face folder.
        data, eval_data: files that `eejax.tune.read_documents` reads; without `eval_data`, documents of `data` are held
            out.
        out: the folder to write; by default `path` with `-exits` appended to its name.
        overwrite: replace an existing checkpoint.
        exits: which exits to tune; by default those of the model, with probes.
        progress: show bars on stderr.

    Returns:
        What `exit_tuning.json` beside the weights says (settings, evaluation before and after), and the folder written.
        With `steps` 0 the model is evaluated with the exits that it would begin with, and nothing is written.

    Raises:
        ConfigError, CheckpointError, TokenizerError: an option or a file is not as it must be, or optax is missing. It
            is raised before any work, and nothing is written.
    """
    options, path = options or TuningOptions(), Path(path).resolve()
    dtype, trains = resolve_dtype(options.dtype), options.steps > 0
    target = _target(path, out, overwrite, trains)
    model = load_config(path)
    config = _exits_to_tune(model, exits or ExitChoice(), trains)
    options.shape(config)  # refuses a sequence length that the model cannot read
    tokenizer = load_tokenizer(path)
    with _status(f"reading {data}", progress):
        train = _documents(data, tokenizer, model)
        if eval_data is None:
            train, held_out = hold_out(train, options.eval_share, options.seed)
        else:
            held_out = _documents(eval_data, tokenizer, model)
    with _status(f"loading {path}", progress):
        tuner = Tuner(config, start_exits(config, *load_checkpoint(path, dtype)), options, progress)
    n_bytes = text_bytes(held_out, tokenizer)
    before = tuner.evaluate(held_out, n_bytes, "evaluating before")
    if not model.exits.probes or config.exits.head != model.exits.head:
        for found in before["exits"].values():  # these probes are untrained: their confidences mean nothing
            found["confidence"].pop("classifier", None)
    report = {
        "exits": {**dataclasses.asdict(config.exits), "layers": list(config.exits.layers)},
        "settings": {**dataclasses.asdict(options), "seq_len": tuner.shape[1], "dtype": dtype.name},
        "training_documents": len(train) if trains else 0,
        "evaluation": {
            "documents": len(held_out),
            "tokens": sum(len(ids) - 1 for ids in held_out),
            "bytes": n_bytes,
            "before": before,
        },
    }
    if target is None:
        return report, None
    stored = {name: leaf for name, leaf in load_lazily(path)[1].items() if name != "exits"}
    tuner.train(train, stored["norm"].dtype)
    report["evaluation"]["after"] = tuner.evaluate(held_out, n_bytes, "evaluating after")
    learnt = jax.tree.map(lambda leaf: leaf.astype(stored["norm"].dtype), tuner.exits)
    with replacing_folder(target) as folder:
        copy_tokenizer(path, folder)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
        write_checkpoint(folder, config, {**stored, "exits": learnt} if jax.tree.leaves(learnt) else stored)
    return report, target


def _target(path: Path, out: str | Path | None, overwrite: bool, trains: bool) -> Path | None:
    """The folder to write, None where nothing is trained. Refuses to train without optax, or into a folder in use."""
    if not trains:
        require(out is None, "with steps 0 nothing is written, so out cannot be given")
        return None
    import_optax()
    target = path.with_name(path.name + "-exits") if out is None else Path(out).resolve()
    check_target(path, target, overwrite)
    return target


def _exits_to_tune(model: ModelConfig, choice: ExitChoice, trains: bool) -> ModelConfig:
    """`choose_exits`; refuses exits in which nothing can be learnt, and untrained probes where nothing is trained."""
    if not trains:
        require(not choice.probes or model.exits.probes, "with steps 0 no probes are trained, and the model has none")
        return choose_exits(model, dataclasses.replace(choice, probes=model.exits.probes))
    exits = choose_exits(model, choice).exits
    require(
        exits.probes or exits.head == "mlp" or not exits.tie_output or (exits.head == "norm" and exits.norm),
        f"{exits.head!r} exits without probes have nothing to tune; choose 'norm' or 'mlp', or tune probes",
    )
    return dataclasses.replace(model, exits=exits)


def _status(says: str, shown: bool) -> AbstractContextManager:
    return Console(stderr=True).status(says) if shown else nullcontext()


def _documents(file: str | Path, tokenizer: Tokenizer, model: ModelConfig) -> list[np.ndarray]:
    documents = read_documents(file, tokenizer)
    highest = max(int(ids.max()) for ids in documents)
    require(
        highest < model.vocab_size,
        f"the tokenizer gives token id {highest} in {file}, and the model knows ids below {model.vocab_size}",
    )
    return documents
