"""Turn a Hugging Face folder into an eejax checkpoint, or back: `python checkpoints/convert_hf.py SOURCE TARGET`.

Tensors pass one at a time: memory is needed for the largest two of them, not for the model. The target appears whole at
the end; an interrupted run leaves nothing under its name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from eejax.core import (
    CheckpointError,
    ConfigError,
    EejaxError,
    ExitConfig,
    ExitHeadKind,
    ModelConfig,
    replacing_folder,
    require,
)
from eejax.device import resolve_dtype
from eejax.model import (
    LazyArray,
    add_exits,
    check_target,
    huggingface,
    is_huggingface,
    leaves,
    load_lazily,
    rebuild,
    write_checkpoint,
)
from eejax.text import copy_tokenizer, has_tokenizer, load_tokenizer

MAX_SHARD_BYTES = 4 * 2**30


class Format(StrEnum):
    """What the source is."""

    HUGGINGFACE = "huggingface"
    MEGATRON_EE = "megatron-ee"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    exits: ExitConfig | None = None,
    format: str = Format.HUGGINGFACE,
    overwrite: bool = False,
    progress: bool = False,
) -> ModelConfig:
    """Write the model in `source` as an eejax checkpoint to `target`, tokenizer files included.

    Args:
        source: a Hugging Face folder, or one of EE-LLM's (`checkpoints.megatron_ee` says how it must look).
        dtype: `float32`, `bfloat16` or `float16`; as stored when not given.
        exits: the exits to add; none when not given. Heads are `shared`, `norm` or `mlp`; the last two begin as copies
            of what the shared head reads, to be trained. A model from EE-LLM brings its own heads, so `exits` only
            says which layers to keep of its exits; all when not given.
        overwrite: replace an existing checkpoint.
        progress: show a bar on stderr.

    Raises:
        CheckpointError, ConfigError: the source is not as it must be, an option is not allowed, or the target exists.
            Nothing is written then.
    """
    source, target = Path(source), Path(target)
    check_target(source, target, overwrite)
    stored = None if dtype is None else resolve_dtype(dtype)
    if format == Format.MEGATRON_EE:
        from checkpoints import megatron_ee

        require(
            exits is None or (exits.head == "shared" and exits.tie_output),
            "a model from EE-LLM brings its exit heads; exit_head is not for it",
        )
        config, params = megatron_ee.load_lazily(source, None if exits is None else exits.layers)
    else:
        require(format == Format.HUGGINGFACE, f"format must be one of {', '.join(Format)}, got {format!r}")
        config, params = huggingface.load_lazily(source)
        exits = exits or ExitConfig(())
        require(bool(exits.layers) or not exits.has_params, f"exit head {exits.head!r} needs exit layers")
        config, params = add_exits(config, params, exits)
    params = _cast(params, stored)
    with replacing_folder(target) as folder, _counted(params, f"writing {target}", progress) as counted:
        copy_tokenizer(source, folder)
        write_checkpoint(folder, config, counted(params))
    return config


def reverse(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    drop_exits: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> ModelConfig:
    """Write an eejax checkpoint as a Hugging Face folder; the inverse of `convert`, to the bit.

    Args:
        max_shard_bytes: start another file beyond this.
        drop_exits: leave out exit heads with parameters of their own, which the format cannot hold.

    Raises:
        CheckpointError, ConfigError: as `convert`; or the model has exit heads and `drop_exits` is false.
    """
    source, target = Path(source), Path(target)
    check_target(source, target, overwrite)
    require(max_shard_bytes > 0, f"max_shard_bytes must be positive, got {max_shard_bytes}")
    stored = None if dtype is None else resolve_dtype(dtype)
    require(not is_huggingface(source), f"{source} is a Hugging Face folder already")
    config, params = load_lazily(source)
    require(
        drop_exits or not config.exits.has_params,
        f"{source} has exits with parameters of their own, which a Hugging Face folder cannot hold: say drop_exits to "
        "leave them out",
    )
    huggingface.to_huggingface(config)  # refuses a model that no family has
    by_name = dict(leaves(_cast(params, stored)))
    tensors = huggingface.write_leaves(config, by_name)
    more: dict[str, Any] = {"torch_dtype": by_name["embedding"].dtype.name}
    with replacing_folder(target) as folder, _counted(tensors, f"writing {target}", progress) as counted:
        copy_tokenizer(source, folder)
        if has_tokenizer(folder):
            tokenizer = load_tokenizer(folder)
            more |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        huggingface.write_config(folder, config, **more)
        huggingface.write_folder(folder, counted(tensors), max_shard_bytes)
    return config


def _cast(params: dict, dtype: Any) -> dict:
    """The leaves as `dtype`, as they are for None. Reading one that does not fit raises `CheckpointError`."""

    def cast(name: str, leaf: LazyArray) -> LazyArray:
        if dtype is None or leaf.dtype == dtype:
            return leaf

        def read() -> np.ndarray:
            array = leaf.read()
            with np.errstate(over="ignore"):
                found = array.astype(dtype)
            if not np.array_equal(np.isfinite(array), np.isfinite(found)):
                raise CheckpointError(f"{name} has values that {dtype} cannot hold (up to {np.abs(array).max():.3g})")
            return found

        return LazyArray(leaf.shape, np.dtype(dtype), read)

    return rebuild(params, {name: cast(name, leaf) for name, leaf in leaves(params)})


@contextmanager
def _counted(tree: dict, title: str, shown: bool) -> Iterator[Callable[[dict], dict]]:
    """A bar over the bytes of a tree of lazy arrays, which advances as they are read."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(title, total=sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))

        def counted(leaf: LazyArray) -> LazyArray:
            def read() -> np.ndarray:
                array = leaf.read()
                bar.advance(task, array.nbytes)
                return array

            return LazyArray(leaf.shape, leaf.dtype, read)

        yield lambda tree: jax.tree.map(counted, tree)


def main(
    source: Annotated[Path, typer.Argument(help="Folder to read.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    exit_layers: Annotated[
        str | None, typer.Option(metavar="E[,E]", help="Blocks that are followed by an exit.", show_default=False)
    ] = None,
    exit_head: Annotated[
        str, typer.Option(metavar="KIND", help="shared, norm or mlp; the last two are to be trained (tune-exits).")
    ] = "shared",
    untie_output: Annotated[
        bool, typer.Option("--untie-output", help="Such heads get output matrices of their own.")
    ] = False,
    format: Annotated[Format, typer.Option(help="What the source is.")] = Format.HUGGINGFACE,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="float32, bfloat16 or float16; by default as stored.")
    ] = None,
    backwards: Annotated[bool, typer.Option("--reverse", help="From an eejax checkpoint to Hugging Face.")] = False,
    max_shard_bytes: Annotated[int, typer.Option(help="With --reverse: size of a file at most.")] = MAX_SHARD_BYTES,
    drop_exits: Annotated[bool, typer.Option("--drop-exits", help="With --reverse: leave trained exits out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Convert a Hugging Face folder (llama, mistral, qwen2, qwen3; safetensors) to an eejax checkpoint, or back."""
    console = Console(stderr=True, highlight=False)
    try:
        layers = None if exit_layers is None else tuple(_integer(part) for part in exit_layers.split(","))
        if backwards:
            require(
                layers is None and exit_head == "shared" and not untie_output, "exit options do not go with --reverse"
            )
            config = reverse(
                source,
                target,
                dtype=dtype,
                max_shard_bytes=max_shard_bytes,
                drop_exits=drop_exits,
                overwrite=overwrite,
                progress=True,
            )
        else:
            exits = None
            if layers is not None or exit_head != "shared" or untie_output:
                head = cast("ExitHeadKind", exit_head)  # ExitConfig refuses any other
                exits = ExitConfig(layers or (), head, tie_output=not untie_output)
            config = convert(
                source,
                target,
                dtype=dtype,
                exits=exits,
                format=format,
                overwrite=overwrite,
                progress=True,
            )
    except EejaxError as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    layers = ", ".join(map(str, config.exits.layers))
    exits = f"exits after {layers} ({config.exits.head})" if layers else "no exits"
    left_out = f"; a Hugging Face folder knows no exits, those after {layers} are left out" if layers else ""
    text = f"{target}: {config.n_layers} blocks{left_out if backwards else f', {exits}'}"
    console.print(text, soft_wrap=True)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--exit-layers must be integers with commas between them, got {text!r}") from None


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # for checkpoints.megatron_ee
    typer.run(main)
