"""The progress bar of `LLM.generate`, in a module of its own because rich is imported only where a bar is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eejax.core import Stage, heard


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for `total` answers, which also shows the program that is being compiled.

    Yields:
        A function to call with the number of finished answers.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answering", total=total)

        def show(stage: Stage) -> None:
            bar.update(task, description=str(stage) if stage.seconds is None else "answering")

        with heard(show):
            yield lambda done: bar.update(task, completed=done)
