"""The summary of a check: at most 40 lines of 118 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_LINES = 40
WIDTH = 118
MOST_STAGES, MOST_ATTENTION, MOST_FILL, MOST_DECODE = 9, 7, 3, 10
"""Lines of a section."""
LONGEST_KERNELS = 5

type Results = Sequence[dict[str, Any]]


def lines(results: Results, dry: bool) -> list[str]:
    """The table."""
    sections = (_machine, _stages, _demo, _small, _attention, _fill, _decode, _profile)
    found = [line for section in sections for line in section(results)]
    foot = ["DRY RUN: tiny shapes, kernels interpreted on a CPU. The figures mean nothing."] if dry else []
    return [line[:WIDTH] for line in found[: MOST_LINES - len(foot)]] + foot


def _of(results: Results, stage: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in results if one["stage"] == stage}


def _number(value: Any, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _machine(results: Results) -> list[str]:
    found = _of(results, "environment")
    machine, copy, product = (found.get(name, {}) for name in ("machine", "copy", "product"))
    versions = machine.get("versions", {})
    what = machine.get("nvidia_smi") or machine.get("device") or "no machine was seen"
    refusal = f"; mosaic refused: {machine['mosaic_refusal']}" if machine.get("mosaic_refusal") else ""
    return [
        f"{what}; {machine.get('date', '')}; commit {str(machine.get('git_commit'))[:10]}",
        f"jax {versions.get('jax')}, CUDA {machine.get('cuda')}, flax {versions.get('flax')}; "
        f"copy {_number(copy.get('gb_s'), 0)} GB/s, bf16 product {_number(product.get('tflop_s'), 0)} TFLOP/s{refusal}",
    ]


def _stages(results: Results) -> list[str]:
    found = _of(results, "stages")
    good = [f"{name} {one['seconds']:.0f}" for name, one in found.items() if one["status"] == "ok"]
    rows = [f"stages ok (s): {', '.join(good) or 'none'}"]
    rows += [f"! {name}: {one['status']}" for name, one in found.items() if one["status"] != "ok"]
    smoke = _of(results, "smoke")
    errors = [one["relative_error"] for one in smoke.values() if "relative_error" in one]
    if errors:
        rows.append(f"smoke: {len(errors)} kernels ran, largest relative error {max(errors):.1e}")
    return rows[:MOST_STAGES]


def _demo(results: Results) -> list[str]:
    rows = []
    for name, one in _of(results, "demo").items():
        if name.startswith("compared"):
            kept = ", ".join(f"{run} {share:.2f}" for run, share in one["tokens_equal_to_float32"].items())
            row = f"demo bf16, {name.split()[1]}: share of tokens equal to float32's: {kept}"
            if "equal_answers" in one:
                row += f"; mosaic equals xla in {one['equal_answers']} of {one['answers']} answers"
            rows.append(row)
    return rows


def _small(results: Results) -> list[str]:
    found = _of(results, "small")
    rows = []
    for what, figure in (("product", "gb_s"), ("norm", "us")):
        cells = []
        for layout in ("feature-major", "token-major"):
            values = [one[figure] for name, one in found.items() if name.startswith(f"{what} {layout}")]
            if values:
                cells.append(f"{layout} {' / '.join(_number(value, 1) for value in values)}")
        if cells:
            rows.append(f"{what}, {'GB/s' if figure == 'gb_s' else 'us'} at 1 / 8 / 32 columns: {'; '.join(cells)}")
    cells = [f"{' '.join(name.split()[2:])} {one['us']:.1f}" for name, one in found.items() if "branches" in name]
    return [*rows, f"a branch, us: {', '.join(cells)}"] if cells else rows


def _cell(row: dict[str, Any], name: str, *figures: str) -> str:
    one = row["implementations"].get(name, {})
    if "us" not in one:
        return "-"
    beside = "/".join(_number(one.get(figure), 2) for figure in figures)
    return f"{one['us']:.0f}{' (' + beside + ')' if beside else ''}{'!' if 'reason' in one else ''}"


def _attention(results: Results) -> list[str]:
    rows = []
    for name, one in _of(results, "attention").items():
        if "implementations" in one:
            mosaic = _cell(one, "mosaic", "of_copy_bandwidth", "kernel_of_copy_bandwidth")
            rows.append(f"  {name}: mosaic {mosaic}, xla {_cell(one, 'xla')}, torch {_cell(one, 'torch')}")
    return ["attention, us (of copy bandwidth/by kernel time):", *rows[:MOST_ATTENTION]] if rows else []


def _fill(results: Results) -> list[str]:
    rows = []
    for name, one in _of(results, "fill").items():
        if "implementations" in one:
            mosaic = _cell(one, "mosaic", "over_weight_read")
            rows.append(f"  {name}: mosaic {mosaic}, xla {_cell(one, 'xla')}, whole blocks {_cell(one, 'full')}")
    return ["fill-in, us (times reading the weights):", *rows[:MOST_FILL]] if rows else []


def _decode(results: Results) -> list[str]:
    rows = []
    for name, one in _of(results, "decode").items():
        ms = one["time_per_output_token_ms"]["p50"]
        row = f"  {name}: {ms:.3f} ms, {_number(one['share_of_bandwidth_bound'], 2)} of the bandwidth bound"
        if one.get("measured_speedup") is not None and not name.endswith(" full"):
            row += f", {one['measured_speedup']:.2f}x of ideal {_number(one['ideal_speedup'], 2)}x"
        rows.append(row)
    return ["decoding, a step:", *rows[:MOST_DECODE]] if rows else []


def _profile(results: Results) -> list[str]:
    rows = []
    for name, one in _of(results, "profile").items():
        rows.append(
            f"profile {name}: {one['launches_a_step']:.0f} launches a step, {one['span_ms_a_step']:.3f} ms, "
            f"busy {one['busy_share']:.2f}"
        )
        longest = ", ".join(
            f"{kernel[:24]} {us:.0f}us/{count}" for kernel, count, us in one["kernels"][:LONGEST_KERNELS]
        )
        rows.append(f"  {longest}")
    return rows
