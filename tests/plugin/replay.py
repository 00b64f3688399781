"""The plugin's runner driven by a recording of vLLM's scheduler, against `batch_generate`: what a server costs short of vLLM itself.

    python tests/plugin/replay.py record --model DIR --streams 32,64 --out FILE       # in an environment with vLLM
    python tests/plugin/replay.py run FILE --model MODEL --device cuda --rounds 5     # needs no vLLM

A recording is what the scheduler hands to the worker in each step: it depends on the number of requests, their lengths and the blocks that
it has, and on no model. So one that is made with a tiny model on a CPU is right for a large one on a GPU. `run` gives the requests fresh
tokens and asks for each step's results as vLLM does: in a thread of its own, and goes on with the next step meanwhile. Time that vLLM's own
processes take is not in it.
Without vLLM its result classes are stand-ins with the same fields.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPT_TOKENS, TOKENS = 18, 128
BLOCK_SIZE = 16
GREEDY: dict[str, Any] = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logit_bias": None, "allowed_token_ids": None, "bad_words_token_ids": None, "min_tokens": 0,
    "num_logprobs": None, "logprob_token_ids": None, "prompt_logprobs": None, "all_stop_token_ids": set(), "structured_outputs": None,
    "thinking_token_budget": None,
}  # fmt: skip  # vLLM's SamplingParams of a greedy request, as the plugin reads them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--model", required=True)
    recording.add_argument("--streams", default="32,64")
    recording.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run")
    running.add_argument("file", type=Path)
    running.add_argument("--model", required=True)
    running.add_argument("--device")
    running.add_argument("--rounds", type=int, default=5)
    running.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        streams = [int(part) for part in args.streams.split(",")]
        text = json.dumps({str(count): record(args.model, count) for count in streams}, separators=(",", ":"))
        args.out.write_bytes(gzip.compress(text.encode(), mtime=0))
        return 0
    recorded = {int(count): steps for count, steps in json.loads(gzip.decompress(args.file.read_bytes())).items()}
    result = run(recorded, args.model, args.device, args.rounds)
    for row in result["rows"]:
        print(
            f"{row['streams']} streams: the runner {row['runner_tok_s']:.1f} tok/s, batch_generate {row['batch_generate_tok_s']:.1f}: "
            f"{row['ratio']:.3f} (medians of {args.rounds} rounds; of pairs {row['ratio_of_pairs']:.3f})"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


# ---- with vLLM ---------------------------------------------------------------------------------------------------------------
def record(model: str, streams: int) -> list[dict[str, Any]]:
    """The scheduler's outputs for so many requests that come together."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from metalstep.plugin.runner import Runner

    steps: list[dict[str, Any]] = []
    execute = Runner.execute_model

    def noted(self: Runner, output: Any) -> Any:
        steps.append(plain(output))
        return execute(self, output)

    options = {"enable_prefix_caching": False, "max_num_seqs": streams, "max_num_batched_tokens": 2048, "max_model_len": 512}
    llm = LLM(model, num_gpu_blocks_override=streams * 16, additional_config={"device": "host"}, **options)
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [1 + (7 * i + j) % 900 for j in range(PROMPT_TOKENS)]} for i in range(streams)]
    Runner.execute_model = noted  # type: ignore[method-assign]
    try:
        llm.generate(prompts, params, use_tqdm=False)
    finally:
        Runner.execute_model = execute  # type: ignore[method-assign]
    return steps


def plain(output: Any) -> dict[str, Any]:
    """What the plugin reads of a SchedulerOutput."""
    cached = output.scheduled_cached_reqs
    assert not output.preempted_req_ids and not cached.resumed_req_ids  # there are blocks for all
    return {
        "new": [
            {"req_id": new.req_id, "prompt": len(new.prompt_token_ids), "blocks": new.block_ids, "computed": new.num_computed_tokens}
            for new in output.scheduled_new_reqs
        ],
        "cached": {"req_ids": cached.req_ids, "blocks": cached.new_block_ids, "computed": cached.num_computed_tokens},
        "scheduled": output.num_scheduled_tokens,
        "finished": sorted(output.finished_req_ids),
    }


# ---- without it --------------------------------------------------------------------------------------------------------------
def stand_ins_for_vllm() -> dict[str, types.ModuleType]:
    """Modules with the classes of vLLM's that the runner makes, by name; torch too where it is not, which makes logprobs of prompts."""

    @dataclass
    class ModelRunnerOutput:
        req_ids: list[str]
        req_id_to_index: dict[str, int]
        sampled_token_ids: list[list[int]] = field(default_factory=list)
        logprobs: Any = None
        prompt_logprobs_dict: dict[str, Any] = field(default_factory=dict)

    outputs = types.ModuleType("vllm.v1.outputs")
    names: dict[str, Any] = {name: type(name, (tuple,), {}) for name in ("LogprobsLists", "LogprobsTensors")}
    names |= {"ModelRunnerOutput": ModelRunnerOutput, "AsyncModelRunnerOutput": object}
    names["EMPTY_MODEL_RUNNER_OUTPUT"] = ModelRunnerOutput([], {})
    vars(outputs).update(names)
    others = ["vllm", "vllm.v1", *([] if importlib.util.find_spec("torch") else ["torch"])]
    return {**{name: types.ModuleType(name) for name in others}, "vllm.v1.outputs": outputs}


def output_of(step: dict[str, Any], prompts: dict[str, list[int]]) -> Any:
    """The step as the plugin reads it. prompts: by request."""
    params = types.SimpleNamespace(**GREEDY)
    new = [
        types.SimpleNamespace(
            req_id=request["req_id"], prompt_token_ids=prompts[request["req_id"]], prefill_token_ids=None, sampling_params=params,
            block_ids=request["blocks"], num_computed_tokens=request["computed"],
        )
        for request in step["new"]
    ]  # fmt: skip
    cached = step["cached"]
    return types.SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=types.SimpleNamespace(
            req_ids=cached["req_ids"], new_block_ids=cached["blocks"], num_computed_tokens=cached["computed"], resumed_req_ids=set()
        ),
        num_scheduled_tokens=step["scheduled"],
        total_num_scheduled_tokens=sum(step["scheduled"].values()),
        finished_req_ids=set(step["finished"]),
        preempted_req_ids=set(),
    )


def run(recorded: dict[int, list[dict[str, Any]]], source: str, device: str | None, rounds: int) -> dict[str, Any]:
    """Tokens per second of the runner and of batch_generate, in turns, a round before the first not counted."""
    import metalstep
    from metalstep.bench.machine import machine
    from metalstep.bench.prompts import Prompts
    from metalstep.bench.statistics import ratio, summary
    from metalstep.served_model import ServedModel

    stand_ins = {} if importlib.util.find_spec("vllm") else stand_ins_for_vllm()
    sys.modules.update(stand_ins)
    from metalstep.plugin.runner import Runner

    for name in stand_ins:
        del sys.modules[name]  # nothing else shall take them for the packages

    most, context = max(recorded), PROMPT_TOKENS + TOKENS + BLOCK_SIZE
    blocks = 1 + max(block for steps in recorded.values() for block in all_blocks(steps))
    model, tokenizer = metalstep.load(source, strict=True, device=device, max_context=2 * context)
    tokenizer.eos_token_ids = set()
    prompts = Prompts.of(tokenizer)
    served = ServedModel(source, device=device, strict=True)
    session = served.allocate(blocks, max_context=2 * context, max_seqs=most)
    runner = Runner(session, block_ratio=1, reasoning=None)
    rows = []
    with model:
        for streams, steps in recorded.items():
            rates: dict[str, list[float]] = {"runner": [], "batch_generate": []}
            for number in range(rounds + 1):
                texts = prompts.take(streams, PROMPT_TOKENS)
                ids = [request["req_id"] for step in steps for request in step["new"]]
                outputs = [output_of(step, dict(zip(ids, texts, strict=True))) for step in steps]
                began = time.perf_counter()
                tokens = replay(runner, outputs)
                middle = time.perf_counter()
                found = metalstep.batch_generate(model, tokenizer, texts, max_tokens=TOKENS, return_token_ids=True).token_ids
                ended = time.perf_counter()
                assert found is not None and tokens == streams * TOKENS == sum(map(len, found))
                if number:
                    rates["runner"].append(tokens / (middle - began))
                    rates["batch_generate"].append(tokens / (ended - middle))
            over = ratio(rates["runner"], rates["batch_generate"])
            summed = {name: summary(samples) for name, samples in rates.items()}
            rows.append(
                {"streams": streams, **{f"{name}_tok_s": one["median"] for name, one in summed.items()}, "ratio": over["of_medians"],
                 "ratio_of_pairs": over["median_of_pairs"], "samples": rates}
            )  # fmt: skip
        name = model.device_description
    served.close()
    return {"machine": machine(), "device": name, "model": source, "prompt_tokens": PROMPT_TOKENS, "tokens": TOKENS, "rows": rows}


def replay(runner: Any, outputs: list[Any]) -> int:
    """Run the steps, each while another thread waits for the one before. Returns the tokens that were sampled."""
    tokens, under_way = 0, None
    with ThreadPoolExecutor(1) as other:
        for output in outputs:
            runner.execute_model(output)
            step = runner.sample_tokens(None)
            begun = None if step is None else other.submit(step.get_output)
            if under_way is not None:
                tokens += sum(map(len, under_way.result().sampled_token_ids))
            under_way = begun
        if under_way is not None:
            tokens += sum(map(len, under_way.result().sampled_token_ids))
    runner.execute_model(output_of({"new": [], "cached": {"req_ids": [], "blocks": [], "computed": []}, "scheduled": {}, "finished":
                                    [req_id for output in outputs for req_id in output.num_scheduled_tokens]}, {}))  # fmt: skip
    return tokens


def all_blocks(steps: list[dict[str, Any]]) -> list[int]:
    tables = [request["blocks"] for step in steps for request in step["new"]]
    tables += [blocks for step in steps for blocks in step["cached"]["blocks"] if blocks is not None]
    return [block for table in tables for group in table for block in group]


if __name__ == "__main__":
    sys.exit(main())
