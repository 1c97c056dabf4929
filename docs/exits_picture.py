"""Draw `docs/exits.svg`, the picture in the README: `python docs/exits_picture.py`, from the repository's root.

The demo model answers two prompts, greedily, at the threshold of `eejax demo`; each token has the shade of its exit
layer. Greedy answers do not change from run to run, so the file changes only with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from eejax import LLM, EarlyExitParams, SamplingParams
from eejax.text import Detokenizer

HERE = Path(__file__).parent
PROMPTS = (
    "What does `git stash` do?",
    "A baker sells 15 loaves in the morning and twice as many in the afternoon. Each loaf costs $3. How much money "
    "does the baker earn that day?",
)
MEASURE, THRESHOLD, MAX_TOKENS = "softmax", 0.5, 64
SHADES = ("#7fd69a", "#f8e08e", "#ffffff")
"""Of tokens that exited after block 4, after block 8, and of tokens that ran all 12 blocks."""
COLUMNS, CHARACTER, LINE, MARGIN = 84, 8.4, 22, 16
"""Characters of a line; width of a character, height of a line and margin in pixels."""

type Run = tuple[str, int]
"""Text, and the exit layer of the token that it belongs to; 0 for text that is no answer."""


def answer_runs(llm: LLM, prompt: str) -> list[Run]:
    """Each token's text and exit layer. A character that several tokens make up belongs to the last of them."""
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, early_exit=EarlyExitParams(threshold=THRESHOLD, measure=MEASURE)
    )
    [output] = llm.chat([{"role": "user", "content": prompt}], params, use_tqdm=False)
    answer = output.outputs[0]
    assert llm.tokenizer is not None
    text = Detokenizer(llm.tokenizer)
    runs = [(text.append(token), layer) for token, layer in zip(answer.token_ids, answer.exit_layers, strict=True)]
    return [*runs, (text.finish(), answer.exit_layers[-1])]


def wrap(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in lines of at most `COLUMNS` characters; a token with a line break ends its line."""
    lines: list[list[Run]] = [[]]
    for text, layer in runs:
        first, *others = text.split("\n")
        if sum(len(part) for part, _ in lines[-1]) + len(first) > COLUMNS:
            lines.append([])
        lines[-1].append((first, layer))
        lines += [[(part, layer)] for part in others]
    return [line for line in lines if any(part for part, _ in line)]


def draw(lines: Sequence[Sequence[Run]], shades: dict[int, str], title: str) -> str:
    """The lines as an SVG. `textLength` holds every run to its width, whatever the viewer's font."""
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), len(lines) * LINE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" fill="#1f2328">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff" stroke="#d0d7de"/>',
    ]
    for number, line in enumerate(lines):
        top, x = MARGIN + number * LINE, float(MARGIN)
        for text, layer in line:
            wide = len(text) * CHARACTER
            if text and layer:
                parts.append(
                    f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{LINE - 2}" fill="{shades[layer]}" '
                    'stroke="#d0d7de" stroke-width="0.5"/>'
                )
            if shown := text.strip():
                left = x + (len(text) - len(text.lstrip())) * CHARACTER
                weight = "" if layer else ' font-weight="bold"'
                parts.append(
                    f'<text x="{left:.1f}" y="{top + 15}" textLength="{len(shown) * CHARACTER:.1f}"{weight}>'
                    f"{escape(shown, quote=False)}</text>"
                )
            x += wide
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Answer, draw, write."""
    llm = LLM(HERE.parent / "checkpoints" / "demo", max_num_seqs=1)
    points = llm.config.model.exit_points
    shades = dict(zip(points, SHADES, strict=True))
    names = [f" exited after block {layer} of {points[-1]} " for layer in points[:-1]] + [f" ran all {points[-1]} "]
    lines: list[list[Run]] = [[run for pair in zip(names, points, strict=True) for run in (pair, ("  ", 0))]]
    for prompt in PROMPTS:
        lines += [[("", 0)], *wrap([(f"{word} ", 0) for word in f"> {prompt}".split()])]
        lines += wrap(answer_runs(llm, prompt))
    title = f"Tokens of the demo model's answers, shaded by exit layer ({MEASURE}, threshold {THRESHOLD})"
    (HERE / "exits.svg").write_text(draw(lines, shades, title))


if __name__ == "__main__":
    main()
