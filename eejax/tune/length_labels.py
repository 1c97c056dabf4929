"""Labels for length heads: how long a model's own answers to prompts are.

They are made as in arXiv 2305.13144: the model answers every prompt at several temperatures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eejax.core import ConfigError, PromptLike, SamplingParams, require
from eejax.serve import LLM
from eejax.text import prompt_ids, read_sourced_prompts
from eejax.tune.length_fit import FOLDS

LABEL_BATCH = 128
"""Prompts answered between two writings of labels: what is written survives an interruption."""
FEWEST_PROMPTS = 2 * FOLDS


@dataclass(frozen=True, slots=True)
class LabelledPrompt:
    """How long a model's own answers to one prompt were.

    Attributes:
        source: what the prompt belongs to, for the report.
        temperatures: of each answer; two neighbours are equal.
        lengths: tokens of each answer, the end token included; `max_tokens` where it was cut off.
    """

    prompt: str
    source: str
    max_tokens: int
    temperatures: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def pair(self) -> int:
        """The first of two answers at one temperature, which are compared with each other."""
        return next(i for i, (a, b) in enumerate(zip(self.temperatures, self.temperatures[1:], strict=False)) if a == b)


def choose_prompts(files: Sequence[str | Path], count: int | None, seed: int) -> list[tuple[str, str]]:
    """About `count` different prompts and their sources, as many of each file, in random order; all for None."""
    rng = np.random.default_rng([seed, 0])
    chosen: dict[str, str] = {}
    for file in files:
        found = dict(read_sourced_prompts(file)).items()
        prompts = [(text, source) for text, source in found if text.strip() and text not in chosen]
        share = len(prompts) if count is None else -(-count // len(files))
        chosen.update(prompts[i] for i in rng.permutation(len(prompts))[:share].tolist())
    mixed = list(chosen.items())
    return [mixed[i] for i in rng.permutation(len(mixed)).tolist()]


def make_labels(
    llm: LLM,
    prompts: Sequence[tuple[str, str]],
    temperatures: Sequence[float],
    max_tokens: int,
    seed: int,
    out: Path | None = None,
) -> list[LabelledPrompt]:
    """Let the model answer every prompt at every temperature, and twice at the middle one.

    Prompts too long to be answered with `max_tokens` tokens are left out.

    Args:
        prompts: texts and their sources.
        seed: of the answers; the same gives the same labels.
        out: a file to which labels are written as they are made, one JSON object a line.
    """
    middle = len(temperatures) // 2
    drawn = [t for i, t in enumerate(temperatures) for _ in range(2 if i == middle else 1)]
    limit = llm.config.max_model_len - max_tokens
    fitting = [(text, source, ids) for text, source in prompts if len(ids := prompt_ids(llm.tokenizer, text)) <= limit]
    seeds = np.random.default_rng([seed, 1]).integers(2**32, size=(len(fitting), len(temperatures))).tolist()
    require_enough(len(fitting))
    if out is not None:
        try:
            out.write_text("")
        except OSError as error:
            raise ConfigError(f"cannot write labels to {out}: {error.strerror or error}") from error
    labels: list[LabelledPrompt] = []
    for start in range(0, len(fitting), LABEL_BATCH):
        part = fitting[start : start + LABEL_BATCH]
        params = [
            SamplingParams(n=2 if i == middle else 1, temperature=t, max_tokens=max_tokens, seed=seeds[start + row][i])
            for row in range(len(part))
            for i, t in enumerate(temperatures)
        ]
        asked: list[PromptLike] = [{"prompt_token_ids": ids} for _, _, ids in part for _ in temperatures]
        outputs = llm.generate(asked, params, use_tqdm=False)
        lengths = np.array([len(answer.token_ids) for output in outputs for answer in output.outputs])
        new = [
            LabelledPrompt(text, source, max_tokens, tuple(drawn), tuple(row))
            for (text, source, _), row in zip(part, lengths.reshape(len(part), -1).tolist(), strict=True)
        ]
        labels += new
        if out is not None:
            with out.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in new)
    return labels


def require_enough(count: int) -> None:
    """Refuse fewer than `FEWEST_PROMPTS` prompts with a `ConfigError`."""
    require(
        count >= FEWEST_PROMPTS,
        f"{count} usable prompts are too few to learn from and to measure on; {FEWEST_PROMPTS} are needed",
    )


def read_labels(file: str | Path) -> list[LabelledPrompt]:
    """Labels that `make_labels` wrote.

    Raises:
        ConfigError: the file is unreadable, holds none, or a line is no label or differs from the first in temperatures
            or `max_tokens`.
    """
    try:
        lines = Path(file).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read labels from {file}: {error.strerror or error}") from error
    labels = [_label(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]
    require(bool(labels), f"{file} holds no labels")
    for number, one in enumerate(labels, start=1):
        made, first = ((label.temperatures, label.max_tokens) for label in (one, labels[0]))
        require(made == first, f"{file}, line {number}: temperatures and max_tokens are {made}, in line 1 {first}")
    return labels


def _label(line: bytes, where: str) -> LabelledPrompt:
    try:
        entry = json.loads(line)
        given = {name: tuple(entry[name]) for name in ("temperatures", "lengths")}
        label = LabelledPrompt(str(entry["prompt"]), str(entry["source"]), int(entry["max_tokens"]), **given)
        good = len(label.lengths) == len(label.temperatures) > label.pair
        if good and all(isinstance(length, int) and 1 <= length <= label.max_tokens for length in label.lengths):
            return label
    except (ValueError, KeyError, TypeError, StopIteration):
        pass
    raise ConfigError(f"{where}: expected a label that train-length wrote, got {line[:80]!r}")
