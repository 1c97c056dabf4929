"""ONNX Runtime GenAI: its engine, which batches continuously."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import time

import harness
import numpy as np
import onnxruntime_genai as genai

EVENTS = 1024


class Engine:
    def __init__(self, model: str, threads: int, requests: list[dict], options: dict) -> None:
        config = genai.Config(model)
        sessions = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": sessions}}}))
        self.model = genai.Model(config)
        self.engine = genai.Engine(self.model)
        self.versions = {"onnxruntime-genai": genai.__version__}

    def answer(self, requests: list[dict]) -> list[harness.Answer]:
        buffer = self.engine.create_event_buffer(EVENTS)
        answers = [harness.Answer([], 0.0, 0.0) for _ in requests]
        begun = []
        for one in requests:
            request = self.engine.create_request()
            turn = genai.TurnOptions(request)
            turn.set_do_sample(False)
            # There is no way to ignore the end token; it is not chosen before the least number of tokens.
            turn.set_min_generated_tokens(one["max_new"])
            turn.set_max_generated_tokens(one["max_new"])
            request.begin_turn(np.array(one["prompt"], np.int32), turn)
            begun.append(request)
        while self.engine.has_pending_requests():
            for event in self.engine.run(buffer):
                flags = int(event.flags)
                if flags & int(genai.EngineEventFlags.FAILED):
                    raise RuntimeError(f"ONNX Runtime GenAI: {event.error_code}")
                if flags & int(genai.EngineEventFlags.TOKEN):
                    answer = answers[next(i for i, request in enumerate(begun) if request == event.request)]
                    answer.tokens.append(int(event.token))
                    answer.finish = time.monotonic()
                    answer.first = answer.first or answer.finish
        for request in begun:
            request.close()
        return answers

    def facts(self) -> dict:
        return {}


if __name__ == "__main__":
    harness.serve(Engine)
