"""The README's promises: each claim, the benchmark that its figure comes from, and, in one table, its bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.peers.tables import fastest_peer

BOUNDS = {
    "exits-demo-b1": (">=", 1.27),
    "exits-demo-b32": (">=", 0.97),
    "exits-demo-agreement": (">=", 0.98),
    "exits-125m-b1": (">=", 1.60),
    "exits-125m-b32": (">=", 1.25),
    "bandwidth-125m": (">=", 0.80),
    "length-fcfs": (">=", 0.85),
    "length-fcfs-latency": ("<=", 0.9),
    "length-static": (">=", 1.75),
    "length-static-latency": ("<=", 0.4),
    "paper-fcfs": (">=", 0.5),
    "paper-fcfs-latency": ("<=", 1.7),
    "paper-static": (">=", 1.0),
    "paper-static-latency": ("<=", 0.7),
    "start-cached": ("<=", 5.0),
    "start-cold": ("<=", 30.0),
    "peers-b1": (">=", 1.05),
    "peers-b32": (">=", 1.33),
    "memory-b32": ("<=", 640.0),
}
"""What the figure of each claim must reach (>=) or must not exceed (<=). Ratios, except for seconds and megabytes."""

type Figure = Callable[[Mapping[str, Any]], float | None]
"""Takes a claim's figure from a benchmark's JSON; None where the claim does not apply to this machine."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A benchmark that several claims take their figures from.

    Attributes:
        command: its name and options.
        quick: options that are added with `--quick`.
        limit: seconds after which it is stopped.
    """

    command: str
    quick: str
    limit: int

    def arguments(self, quick: bool) -> list[str]:
        """The command line after `python -m bench`."""
        return [*self.command.split(), *(self.quick.split() if quick else [])]


EXITS_DEMO = Measurement(
    "exits --measures margin --thresholds 0.6 --batch-sizes 1,32 --batch-rule rows --speed-prompts 2 "
    "--quality-prompts 64 --max-tokens 128 --num-iters 9",
    "--quality-prompts 2 --max-tokens 8 --output-len 8 --num-iters 1",
    150,
)
EXITS_125M = Measurement(
    "exits --random llama-125m --replay 0.7,0.2 --batch-sizes 1,32 --batch-rule rows --speed-prompts 1 --output-len 64",
    "--output-len 4 --num-iters 1",
    200,
)
SCHEDULE = Measurement(
    "schedule --rows static,paper,fcfs,length_hidden --regimes limited --modes full_depth --rates none "
    "--num-prompts 64 --max-tokens 256 --num-iters-warmup 0",
    "--num-prompts 8 --max-tokens 48 --num-iters 1",
    270,
)
START = Measurement("start", "--num-iters 1", 200)
PEERS = Measurement(
    "peers --model S --workload b1,b32 --peer openvino,ort,llamacpp --rounds 5 --no-wait",
    "--rounds 1",
    300,
)


def at(path: str, per: float = 1.0) -> Figure:
    """The figure at a path of keys and list positions such as `settings/0/speed`, divided by `per`."""

    def figure(result: Mapping[str, Any]) -> float:
        found: Any = result
        for key in path.split("/"):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found / per

    return figure


def over_fastest_peer(case: str) -> Figure:
    """Tokens/s of eejax over those of the fastest other engine; None where no other is installed."""

    def figure(result: Mapping[str, Any]) -> float | None:
        rows = result["cases"][case]["rows"]
        fastest = fastest_peer(rows)
        if fastest is None:
            return None
        return rows["eejax"]["output_tokens_per_s"] / rows[fastest]["output_tokens_per_s"]

    return figure


@dataclass(frozen=True, slots=True)
class Claim:
    """One promise of the README; its bound is in `BOUNDS`.

    Attributes:
        sentence: what the figure says, as the README's table has it.
        unit: of the figure; ratios have none.
    """

    name: str
    sentence: str
    measurement: Measurement
    figure: Figure
    unit: str = ""

    def holds(self, figure: float) -> bool:
        """Whether a figure, rounded as it is shown, keeps the promise."""
        sign, bound = BOUNDS[self.name]
        shown = round(figure, self._digits)
        return shown >= bound if sign == ">=" else shown <= bound

    @property
    def _digits(self) -> int:
        return {"": 2, "s": 1, "MB": 0}[self.unit]

    def show(self, figure: float) -> str:
        """A figure of this claim as text."""
        return f"{figure:,.{self._digits}f} {self.unit}".strip()

    def show_bound(self) -> str:
        """The bound as text."""
        sign, bound = BOUNDS[self.name]
        return f"at {'least' if sign == '>=' else 'most'} {self.show(bound)}"


def _exits(name: str, what: str, measurement: Measurement) -> list[Claim]:
    """Exits over full depth, alone and in a batch."""
    return [
        Claim(
            f"{name}-b{batch}",
            f"{what}, over full depth, {batch} request{'s' * (batch > 1)}: tokens/s",
            measurement,
            at(f"settings/0/speed/{batch}/rows/measured_speedup"),
        )
        for batch in (1, 32)
    ]


FIGURES = (("", "requests_per_s", "requests/s"), ("-latency", "latency_mean", "mean latency"))
"""Of a policy: the end of the claim's name, the figure's key, and what it is called."""


def _schedule(name: str, what: str, row: str) -> list[Claim]:
    """A scheduling policy over `fcfs` and `static`: requests/s, then mean latency."""
    return [
        Claim(
            f"{name}-{baseline}{suffix}",
            f"demo, limited memory, 64 requests at once, {what} over `{baseline}`: {shown}",
            SCHEDULE,
            at(f"regimes/limited/modes/full_depth/{row}/{figure}_over_{baseline}"),
        )
        for baseline in ("fcfs", "static")
        for suffix, figure, shown in (
            ("", "requests_per_s", "requests/s"),
            ("-latency", "latency_mean", "mean latency"),
        )
    ]


def _peers(batch: int) -> Claim:
    what = f"22M parameters, full depth, {batch} request{'s' * (batch > 1)}"
    return Claim(
        f"peers-b{batch}", f"{what}, over the fastest other engine: tokens/s", PEERS, over_fastest_peer(f"S b{batch}")
    )


CLAIMS = (
    *_exits("exits-demo", "demo, exits (`margin` 0.6)", EXITS_DEMO),
    Claim(
        "exits-demo-agreement",
        "demo, exits (`margin` 0.6): share of the tokens that full depth would have chosen",
        EXITS_DEMO,
        at("settings/0/quality/agreement"),
    ),
    *_exits("exits-125m", "125M parameters, exits drawn (70 % after 4 of 12 blocks, 20 % after 8)", EXITS_125M),
    Claim(
        "bandwidth-125m",
        "125M parameters, full depth, 1 request: share of the bound that memory bandwidth sets",
        EXITS_125M,
        at("full_depth/speed/1/rows/share_of_bound"),
    ),
    *_schedule("length", "`length`", "length_hidden"),
    *_schedule("paper", "the method of Zheng et al.", "paper"),
    Claim("start-cached", "demo, from starting Python to the first token", START, at("cached/first_token_s"), "s"),
    Claim("start-cold", "the same, with nothing compiled before", START, at("cold/first_token_s"), "s"),
    _peers(1),
    _peers(32),
    Claim(
        "memory-b32",
        "22M parameters, full depth, 32 requests: peak memory",
        PEERS,
        at("cases/S b32/rows/eejax/peak_bytes", 1e6),
        "MB",
    ),
)
