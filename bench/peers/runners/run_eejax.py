"""eejax through its public API. Options: `exit_layers` and `thresholds` replay exits (measure `random`)."""

from __future__ import annotations

from importlib.metadata import version

import harness

from eejax import LLM, EarlyExitParams, SamplingParams

SLOTS = 32


class Engine:
    def __init__(self, model: str, threads: int, requests: list[dict], options: dict) -> None:
        longest = max(len(one["prompt"]) + one["max_new"] for one in requests)
        exits = options.get("exit_layers")
        self.llm = LLM(
            model, dtype="float32", max_model_len=longest, max_num_seqs=min(SLOTS, len(requests)), exit_layers=exits
        )
        self.early = EarlyExitParams(threshold=tuple(options["thresholds"]), measure="random") if exits else None
        self.versions = {name: version(name) for name in ("jax", "jaxlib")}
        self.before = self.llm.stats()

    def answer(self, requests: list[dict]) -> list[harness.Answer]:
        self.before = self.llm.stats()
        params = [
            SamplingParams(temperature=0, max_tokens=one["max_new"], ignore_eos=True, seed=i, early_exit=self.early)
            for i, one in enumerate(requests)
        ]
        outputs = self.llm.generate([{"prompt_token_ids": one["prompt"]} for one in requests], params, use_tqdm=False)
        answers = []
        for output in outputs:
            if output.error is not None:
                raise output.error
            times = output.metrics
            if times is None or times.first_token_time is None or times.finish_time is None:
                raise RuntimeError(f"request {output.request_id} came back without its times")
            answers.append(harness.Answer(list(output.outputs[0].token_ids), times.first_token_time, times.finish_time))
        return answers

    def facts(self) -> dict:
        """Of the pass in full."""
        after = self.llm.stats()
        steps = after.steps - self.before.steps
        return {
            "decode_steps": steps,
            "rows_per_step": (after.row_steps - self.before.row_steps) / max(1, steps),
            "compilations_while_timed": after.compilations - self.before.compilations,
            "schedule_seconds": after.schedule_seconds - self.before.schedule_seconds,
        }


if __name__ == "__main__":
    harness.serve(Engine)
