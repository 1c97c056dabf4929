"""What XLA's profiler recorded: operations in time, and the instructions of a program that they come from."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

CONTAINERS = ("while", "conditional", "call")
"""Instructions whose time contains that of others."""
CONTROL_FLOW = "control flow"
SCOPES = ("products", "attention", "kv_write", "heads", "confidence", "fill", "sampling")
BY_TARGET = {
    "eejax_linear": "products",
    "eejax_paged_attention": "attention",
    "eejax_write": "kv_write",
    "eejax_head": "heads",
}
"""Part of a custom call outside of all scopes."""
_WRAPPED = re.compile(r"^((?:vmap|jvp|transpose)\()+(.*?)\)+$")
"""A scope inside JAX's transformations. `jit(` stands around a function's name, which is no scope."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that ran; times in nanoseconds. `run` tells calls of a program apart."""

    name: str
    start: float
    length: float
    run: int = 0


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
        op_name: where it was traced, scopes separated by `/`; empty where XLA made it.
        target: of a custom call.
        inner: `op_name` of every instruction in a fusion; its own is that of the root alone.
    """

    opcode: str
    op_name: str = ""
    target: str = ""
    inner: tuple[str, ...] = ()


@contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Record what runs while the context is open into `folder`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would be most of the trace
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield


def _planes(folder: Path) -> list[Any]:
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return list(jax.profiler.ProfileData.from_file(str(newest)).planes)


def device_events(folder: Path) -> list[Event]:
    """Events of the device in the newest trace in `folder`; on a CPU, events of XLA's threads."""
    planes = _planes(folder)
    chosen = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    found = []
    for plane in chosen or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
        for line in plane.lines:
            # Other lines of a device repeat the events by module or by operation.
            if not chosen or line.name.startswith("Stream"):
                found += [Event(one.name, one.start_ns, one.duration_ns) for one in line.events]
    return sorted(found, key=lambda one: one.start)


def cpu_runs(folder: Path, module: str) -> list[list[Event]]:
    """What each call of programs named `module` ran on a CPU, in the newest trace in `folder`; calls in order of time.

    Events are looked for on every thread: XLA runs a program on those of its pool or on the caller's. A loop may hand
    its body to another thread and return; what ends it is an event `end: NAME`, which carries the number of the first.
    """
    operations, ends = [], {}
    with warnings.catch_warnings():
        # A type of jaxlib's: "builtin type event_stats has no __module__ attribute".
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in _planes(folder):
            for line in plane.lines:
                for one in line.events:
                    stats = dict(one.stats)
                    if stats.get("hlo_module") == module and "hlo_op" in stats:
                        operations.append((one.start_ns, one.duration_ns, stats))
                    elif one.name.startswith("end: "):
                        ends[stats.get("_c")] = one.start_ns
    runs: dict[int, list[Event]] = {}
    for start, duration, stats in sorted(operations, key=lambda one: one[0]):
        end = max(start + duration, ends.get(stats.get("_p"), 0.0))
        event = Event(str(stats["hlo_op"]), start, end - start, int(stats["run_id"]))
        runs.setdefault(event.run, []).append(event)
    return list(runs.values())


_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z0-9-]*)\((.*)$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.-]+)")


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def module_name(program: str) -> str:
    """Name of the program whose text (`compiled.as_text()`) this is."""
    return _first(re.compile(r"HloModule ([\w.-]+)"), program)


def instructions(program: str) -> dict[str, Instruction]:
    """All instructions of a program's text by name; a program has no two of one name."""
    found: dict[str, tuple[str, str]] = {}
    op_names: dict[str, list[str]] = {}
    computation = ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            name, opcode, rest = match.groups()
            found[name] = opcode, rest
            op_names.setdefault(computation, []).append(_first(_OP_NAME, rest))
    return {
        name: Instruction(
            opcode,
            _first(_OP_NAME, rest),
            _first(_TARGET, rest),
            tuple(op_names.get(_first(_CALLS, rest), ())) if opcode == "fusion" else (),
        )
        for name, (opcode, rest) in found.items()
    }


def scope_of(op_name: str) -> str:
    """The innermost part among the scopes of `op_name`, or nothing."""
    for name in reversed(op_name.split("/")):
        scope = _WRAPPED.sub(r"\2", name)
        if scope in SCOPES:
            return scope
    return ""


def part_of(one: Instruction) -> str:
    """The part that an instruction's own time belongs to.

    A fusion belongs to the part of its root, or else to that of most of its instructions that have a scope.
    """
    if one.opcode in CONTAINERS:
        return CONTROL_FLOW
    inner = Counter(filter(None, map(scope_of, one.inner)))
    found = scope_of(one.op_name) or BY_TARGET.get(one.target) or (max(inner, key=inner.__getitem__) if inner else "")
    return found or ("copies" if one.opcode == "copy" else "other")


def split(events: Iterable[Event], parts: Mapping[str, str]) -> dict[str, float]:
    """Nanoseconds of each part; they sum to the time from the first start to the last end.

    A moment belongs to the operations that run in it, in equal shares where there are several. One in which none runs,
    or nothing but what `parts` calls control flow, is control flow: so a loop keeps what its body leaves of it.

    Args:
        parts: part of each event by its name.
    """
    found: dict[str, float] = {}
    running: Counter[str] = Counter()
    before = None
    for now, change, part in sorted(_marks(events, parts)):
        if before is not None and now > before:
            active = running.total()
            for one, count in running.items() if active else [(CONTROL_FLOW, 1)]:
                found[one] = found.get(one, 0.0) + (now - before) * count / (active or 1)
        if part != CONTROL_FLOW:
            running[part] += change
        before = now
    return found


def _marks(events: Iterable[Event], parts: Mapping[str, str]) -> Iterator[tuple[float, int, str]]:
    """When operations start (1) and end (-1)."""
    for one in events:
        yield one.start, 1, parts[one.name]
        yield one.start + one.length, -1, parts[one.name]
