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


def choose_exits(
    model: ModelConfig,
    layers: Sequence[int] | None = None,
    head: ExitHeadKind | None = None,
    tie_output: bool | None = None,
    probes: bool | None = None,
) -> ModelConfig:
    """The model with the exits that are to be tuned; what is not given is as the model has it.

    A model without exits gets `norm` heads after a quarter, a half and three quarters of its blocks. Exits get probes
    unless `probes` says otherwise.

    Raises:
        ConfigError: an exit layer does not exist, or exits of this kind cannot be tuned.
    """
    old = model.exits
    if head is None:
        head = old.head if old.layers else "norm"
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
        tie_output=tie_output if tie_output is not None else old.tie_output or not same,
        probes=True if probes is None else probes,
    )
    new = [layer for layer in exits.layers if layer not in old.layers]
    require(exits.norm or not new, f"the model's exits have no norm, so none can be added after blocks {new}")
    return dataclasses.replace(model, exits=exits)


def start_exits(config: ModelConfig, model: ModelConfig, params: dict) -> dict:
    """Parameters of `model` with the exits of `config` in place of its own.

    An exit that `model` has already, of the same kind, starts from there; any other equals the shared head to begin
    with (`eejax.model.exit_heads.add_exits`), and its probe is undecided.
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
    exit_layers: Sequence[int] | None = None,
    exit_head: ExitHeadKind | None = None,
    tie_output: bool | None = None,
    probes: bool | None = None,
    eval_data: str | Path | None = None,
    dtype: str | None = None,
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
        out: the folder to write; `path` with `-exits` behind it by default.
        overwrite: replace a checkpoint that is there.
        exit_layers, exit_head, tie_output, probes: the exits, as `choose_exits` says.
        dtype: what the backbone computes in; by default float32 on CPU and bfloat16 elsewhere.
        progress: show bars on stderr.

    Returns:
        What `exit_tuning.json` beside the weights says (settings, evaluation before and after), and the folder written.
        With `steps` 0 the model is evaluated with the exits that it would begin with, and nothing is written.

    Raises:
        ConfigError, CheckpointError, TokenizerError: an option or a file is not as it must be, or there is no optax.
            Before any work, and nothing is written.
    """
    options = options or TuningOptions()
    path, wanted = Path(path).resolve(), resolve_dtype(dtype)
    trains = options.steps > 0
    target = None
    if trains:
        import_optax()
        target = path.with_name(path.name + "-exits") if out is None else Path(out).resolve()
        check_target(path, target, overwrite)
    require(trains or out is None, "with steps 0 nothing is written, so out cannot be given")
    model = load_config(path)
    require(trains or not probes or model.exits.probes, "with steps 0 no probes are trained, and the model has none")
    config = choose_exits(model, exit_layers, exit_head, tie_output, model.exits.probes if not trains else probes)
    options.shape(config)
    learnt = config.exits.probes or config.exits.head == "mlp" or not config.exits.tie_output
    require(
        not trains or learnt or (config.exits.head == "norm" and config.exits.norm),
        f"{config.exits.head!r} exits without probes have nothing to tune; choose 'norm' or 'mlp', or tune probes",
    )
    tokenizer = load_tokenizer(path)
    with _status(f"reading {data}", progress):
        train = _documents(data, tokenizer, model)
        if eval_data is None:
            train, held_out = hold_out(train, options.eval_share, options.seed)
        else:
            held_out = _documents(eval_data, tokenizer, model)
    with _status(f"loading {path}", progress):
        tuner = Tuner(config, start_exits(config, *load_checkpoint(path, wanted)), options, progress)
    n_bytes = text_bytes(held_out, tokenizer)
    before = tuner.evaluate(held_out, n_bytes, "evaluating before")
    if not model.exits.probes or config.exits.head != model.exits.head:
        for found in before["exits"].values():  # probes that have learnt nothing have nothing to say
            found["confidence"].pop("classifier", None)
    report = {
        "exits": {**dataclasses.asdict(config.exits), "layers": list(config.exits.layers)},
        "settings": {**dataclasses.asdict(options), "seq_len": tuner.shape[1], "dtype": wanted.name},
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
    exits = jax.tree.map(lambda leaf: leaf.astype(stored["norm"].dtype), tuner.exits)
    with replacing_folder(target) as folder:
        copy_tokenizer(path, folder)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
        write_checkpoint(folder, config, {**stored, "exits": exits} if jax.tree.leaves(exits) else stored)
    return report, target


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
