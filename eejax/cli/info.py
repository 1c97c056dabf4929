"""What a checkpoint holds, for `eejax info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from eejax.core import EngineOptions
from eejax.device import choose_kernels, page_bytes, resolve_dtype
from eejax.model import count_params, load_lazily, param_shapes
from eejax.schedule import load_length_heads
from eejax.serve import exit_costs, load_calibration
from eejax.text import load_end_tokens, load_tokenizer


def describe(path: Path, options: EngineOptions) -> dict[str, Any]:
    """Facts about a checkpoint folder, ready for JSON. Only metadata is read, unless something is wrong.

    Args:
        path: the checkpoint folder.
        options: `dtype` and `page_size` with which it would be served.

    Raises:
        CheckpointError, TokenizerError: the folder is not a usable checkpoint.
        ConfigError: `EEJAX_KERNELS` has an unknown value.
    """
    served, page_size = resolve_dtype(options.dtype), options.page_size
    model, stored = load_lazily(path)
    stored_leaves = jax.tree.leaves(stored)
    shapes = param_shapes(model)
    total = count_params(shapes)
    tokenizer = load_tokenizer(path)
    lengths = load_length_heads(path, model)
    calibration = load_calibration(path)
    return {
        "path": str(path),
        "model": model.to_dict(),
        "parameters": total,
        "parameters_by_part": {
            "embedding": shapes["embedding"].size,
            "blocks": count_params(shapes["blocks"]),
            "output": 0 if model.tie_embeddings else shapes["output"].size,
            "exit heads": count_params(shapes.get("exits", {})),
        },
        "stored_dtype": ", ".join(sorted({leaf.dtype.name for leaf in stored_leaves})),
        "stored_bytes": sum(leaf.nbytes for leaf in stored_leaves),
        "served_dtype": served.name,
        "served_bytes": total * served.itemsize,
        "kernels": {name: choice._asdict() for name, choice in choose_kernels(model, page_size, served).items()},
        "exit_layers": list(model.exits.layers),
        "exit_head": model.exits.head,
        "exit_costs": [
            {"layer": exit_.layer, "blocks": exit_.asked, "blocks_without_logits": without.asked}
            for exit_, without in zip(
                exit_costs(model, with_logits=True), exit_costs(model, with_logits=False), strict=True
            )
        ],
        "length_heads": None if lengths is None else dict(lengths.about),
        "calibration": None if calibration is None else calibration.to_dict(),
        "tokenizer": {
            "kind": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "end_ids": sorted(load_end_tokens(path, tokenizer)),
            "chat_template": tokenizer.has_chat_template,
        },
        "kv_page": {
            "page_size": page_size,
            "bytes": page_bytes(model, page_size, served.itemsize),
            "bytes_per_token": page_bytes(model, 1, served.itemsize),
            "bytes_longest_sequence": -(-model.max_position // page_size)
            * page_bytes(model, page_size, served.itemsize),
        },
    }


def size(count: float) -> str:
    """Bytes in readable units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _promise(measure: str, found: dict[str, Any]) -> str:
    threshold = "nothing certified" if found["threshold"] is None else f"{found['threshold']:g}"
    return f"{measure} {threshold} ({found['loss']} risk {found['max_risk']:g}, confidence {found['confidence']:g})"


def _exit_costs(found: list[dict[str, Any]]) -> str:
    if not found:
        return "none"
    with_logits, without = (
        ", ".join(f"{one[key]:.2f} after {one['layer']}" for one in found)
        for key in ("blocks", "blocks_without_logits")
    )
    return f"per token, in blocks by weights read: {with_logits}; by a measure without logits: {without}"


def print_description(found: dict[str, Any]) -> None:
    """Print what `describe` found as a table."""
    model, page, tokenizer = found["model"], found["kv_page"], found["tokenizer"]
    parts = ", ".join(f"{name} {count:,}" for name, count in found["parameters_by_part"].items() if count)
    tied = "tied" if model["tie_embeddings"] else "untied"
    exits = ", ".join(map(str, found["exit_layers"])) or "none"
    head = f", {found['exit_head']} heads" if found["exit_layers"] else ""
    ends = ", ".join(map(str, tokenizer["end_ids"])) or "none"
    calibration = found["calibration"] or {"measures": {}}
    promises = ", ".join(_promise(name, one) for name, one in calibration["measures"].items())
    rows = {
        "blocks": f"{model['n_layers']}",
        "exits after blocks": exits + head,
        "asking an exit costs": _exit_costs(found["exit_costs"]),
        "hidden, MLP": f"{model['hidden_size']}, {model['intermediate_size']}",
        "heads": f"{model['n_heads']} query, {model['n_kv_heads']} key/value, {model['head_dim']} wide",
        "vocabulary": f"{model['vocab_size']} ({tied} output)",
        "longest sequence": f"{model['max_position']} tokens",
        "parameters": f"{found['parameters']:,} ({parts})",
        "stored": f"{found['stored_dtype']}, {size(found['stored_bytes'])}",
        "served": f"{found['served_dtype']}, {size(found['served_bytes'])}",
        "tokenizer": f"{tokenizer['kind']}, {tokenizer['vocab_size']} ids, BOS {tokenizer['bos_id']}, "
        f"end {ends}, {'a' if tokenizer['chat_template'] else 'no'} chat template",
        "length heads": "none" if found["length_heads"] is None else "prompt, hidden",
        "calibrated thresholds": promises or "none",
        "kernels": "; ".join(
            f"{name} {choice['implementation']}" + (f" (not mosaic: {choice['refusal']})" if choice["refusal"] else "")
            for name, choice in found["kernels"].items()
        ),
        "KV page": f"{page['page_size']} tokens, {size(page['bytes'])}; {size(page['bytes_per_token'])} per token, "
        f"{size(page['bytes_longest_sequence'])} for the longest sequence",
    }
    table = Table(title=found["path"], title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)
