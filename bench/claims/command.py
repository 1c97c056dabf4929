"""Whether what the README promises still holds: `python -m bench claims`.

A claim is a figure of one of the other benchmarks, mostly a ratio within one run: both sides are measured in turn, and
medians are compared. Each benchmark runs in a process of its own and within a time limit, all of them within 15
minutes. The exit code is 1 when a figure falls short of its bound or could not be measured.

`--write README.md` replaces what stands between `<!-- claims -->` and `<!-- /claims -->` by the table of figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import machine
from bench.claims.registry import BOUNDS, CLAIMS, Claim, Measurement
from bench.common import finish, options_of
from bench.process import ProcessFailedError, run_process, scratch_folder
from eejax.core import ConfigError

ROOT = Path(__file__).resolve().parents[2]
WHOLE_RUN = 15 * 60
"""Seconds for all benchmarks together."""
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a claim: a figure, or the reason why there is none. `skipped`: it does not apply here."""

    claim: Claim
    figure: float | None = None
    problem: str | None = None

    @property
    def state(self) -> str:
        """`holds`, `short`, `skipped` or `failed`."""
        if self.problem is not None:
            return "failed"
        if self.figure is None:
            return "skipped"
        return "holds" if self.claim.holds(self.figure) else "short"

    def to_dict(self) -> dict[str, Any]:
        """For the result's JSON."""
        claim = self.claim
        return {
            "sentence": claim.sentence,
            "figure": self.figure,
            "unit": claim.unit,
            "bound": BOUNDS[claim.name],
            "state": self.state,
            "problem": self.problem,
            "command": f"python -m bench {claim.measurement.command}",
        }


def run(measurement: Measurement, quick: bool, limit: float) -> dict[str, Any]:
    """Run a benchmark in a process of its own, for at most `limit` seconds. Returns its JSON.

    Raises:
        ProcessFailedError: it failed or took too long.
    """
    if limit <= 0:
        raise ProcessFailedError(f"no time was left of {WHOLE_RUN} s")
    with scratch_folder() as folder:
        out = folder / "out.json"
        command = [sys.executable, "-m", "bench", *measurement.arguments(quick), "--output-json", out]
        run_process(command, folder / "log", limit, {"PYTHONPATH": str(ROOT)})
        return json.loads(out.read_text())


def measure(claims: Sequence[Claim], quick: bool, say: Console) -> list[Finding]:
    """Run every benchmark that these claims need once, and take their figures from it."""
    results: dict[Measurement, dict[str, Any]] = {}
    problems: dict[Measurement, str] = {}
    end = time.monotonic() + WHOLE_RUN
    for one in dict.fromkeys(claim.measurement for claim in claims):
        say.print(f"python -m bench {' '.join(one.arguments(quick))}", markup=False)
        start = time.monotonic()
        try:
            results[one] = run(one, quick, min(one.limit, end - start))
            say.print(f"  {time.monotonic() - start:.0f} s", markup=False)
        except ProcessFailedError as error:
            problems[one] = str(error)
            say.print(f"  {error}", style="red", markup=False)
    return [
        Finding(claim, problem=problems[claim.measurement])
        if claim.measurement in problems
        else finding(claim, results[claim.measurement])
        for claim in claims
    ]


def finding(claim: Claim, result: Mapping[str, Any]) -> Finding:
    """A claim's figure from its benchmark's JSON."""
    try:
        return Finding(claim, claim.figure(result))
    except (KeyError, IndexError, TypeError) as error:  # a row that could not be measured has no figures
        return Finding(claim, problem=f"no figure: {error!r}")


def known(claims: Sequence[Claim], result: Mapping[str, Any]) -> list[Finding]:
    """The findings of an earlier run, beside today's bounds; claims that it did not measure are left out."""
    found = result["claims"]
    return [Finding(one, found[one.name]["figure"], found[one.name]["problem"]) for one in claims if one.name in found]


def chosen(names: str | None) -> list[Claim]:
    """The claims of `--only`: by name, or by the beginning of the name up to a hyphen. All without it.

    Raises:
        ConfigError: a name that no claim has.
    """
    if names is None:
        return list(CLAIMS)
    wanted = names.split(",")
    for name in wanted:
        if not any(_is_called(claim, name) for claim in CLAIMS):
            raise ConfigError(f"--only: there is no claim {name!r}; there are {', '.join(one.name for one in CLAIMS)}")
    return [claim for claim in CLAIMS if any(_is_called(claim, name) for name in wanted)]


def _is_called(claim: Claim, name: str) -> bool:
    return claim.name == name or claim.name.startswith(f"{name}-")


def markdown(findings: Sequence[Finding], origin: Mapping[str, Any]) -> str:
    """The README's table, and a line that says where its figures come from."""
    lines = ["| | measured | promised |", "|---|---:|---:|"]
    for one in findings:
        figure = one.state if one.figure is None else one.claim.show(one.figure)
        if one.state == "short":
            figure += " (falls short)"
        lines.append(f"| {one.claim.sentence} | {figure} | {one.claim.show_bound()} |")
    commit = (origin["git_commit"] or "unknown")[:7]
    source = f"`python -m bench claims`, {origin['date'][:10]}, commit {commit}, jax {origin['jax']}, float32"
    skipped = " Skipped: no other engine was installed." * any(one.state == "skipped" for one in findings)
    return "\n".join((*lines, "", f"{source}, {origin['cpu_model']}, processors used: {origin['cpus']}.{skipped}"))


def around(file: Path) -> tuple[str, str]:
    """The text before and after the block between the two marks of `file`.

    Raises:
        ConfigError: the file cannot be read, or does not have both marks once, in this order.
    """
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(f"--write: {error}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(f"--write: {file} must have {BEGIN} and, after it, {END}, each once")
    return before, after


def show(findings: Sequence[Finding]) -> None:
    """Print every claim with its figure and bound, then those that fell short."""
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    table = Table()
    for i, column in enumerate(("claim", "", "measured", "promised", "")):
        table.add_column(column, justify="right" if i in (2, 3) else "left")
    for one in findings:
        claim = one.claim
        figure = "" if one.figure is None else claim.show(one.figure)
        table.add_row(claim.name, claim.sentence.replace("`", ""), figure, claim.show_bound(), one.state)
    console.print(table)
    for problem in dict.fromkeys(one.problem for one in findings if one.problem):
        names = ", ".join(one.claim.name for one in findings if one.problem == problem)
        console.print(f"not measured: {names}: {problem}", markup=False, soft_wrap=True)
    short = [one.claim.name for one in findings if one.state == "short"]
    console.print(f"fell short: {', '.join(short)}" if short else "no figure fell short", markup=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m bench claims", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--only", metavar="NAME[,NAME]", help="these claims, or those whose names begin so")
    found.add_argument("--quick", action="store_true", help="one short round: that it runs, not what it measures")
    found.add_argument("--from-json", type=Path, metavar="FILE", help="figures of an earlier run instead of new ones")
    found.add_argument("--markdown", action="store_true", help="print the README's table too")
    found.add_argument("--write", type=Path, metavar="README.md", help="put the table between this file's marks")
    found.add_argument("--output-json", type=Path, metavar="FILE", help="write the result here too")
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark. Returns 1 if a claim fell short or could not be measured."""
    args = parser().parse_args(arguments)
    if args.write is not None and (args.quick or args.only):
        raise ConfigError("--write needs proper figures of all claims, so it cannot be used with --quick or --only")
    claims = chosen(args.only)
    before, after = around(args.write) if args.write is not None else ("", "")  # before anything is measured
    if args.from_json is not None:
        origin = json.loads(args.from_json.read_text())
        findings = known(claims, origin)
    else:
        origin = machine.provenance()
        findings = measure(claims, args.quick, Console(stderr=True, highlight=False, soft_wrap=True))
    show(findings)
    table = markdown(findings, origin)
    if args.markdown:
        print(table)
    if args.write is not None:
        args.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    kept = {key: origin[key] for key in machine.provenance()}
    found = {one.claim.name: one.to_dict() for one in findings}
    finish({"bench": "claims", **kept, "options": options_of(args), "claims": found}, args.output_json)
    return 1 if any(one.state in ("short", "failed") for one in findings) else 0
