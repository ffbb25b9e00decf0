"""Planned and measured memory: python -m benchmarks.plan_vs_measured MODEL [--shares 150 60 30].

Serves MODEL under budgets that are shares of its weights (or sizes: --budgets 16GB 8GB), asks it over HTTP,
and compares: the plan's peak, the peak that the server measured, the peak seen from outside, and the budget;
and the greedy tokens with those of transformers' generate on the same device. From outside means: on the CPU,
resident memory (pages of files included) above what it was before loading; on a GPU, by NVML, memory of the
process where the driver tells it, and of the card above what was in use before (alone on the card, please).
A budget under which the plan is refused is a row that says what the smallest one is, and that one is served
too; a server that does not become ready is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.server import Server, elsewhere
from loader import checkpoint, probe
from loader.budget import MemoryBudget, parse_bytes
from loader.errors import BudgetExceeded
from loader.plan import Plan, make_plan

PROMPT = "Tell me, in a few plain words, how a model that is larger than the memory can still be run. "


def oracle(model: Path, device: str, prompt: str, max_tokens: int) -> str:
    """The greedy answer of transformers' own generate, as text, with the attention that the runner uses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Kernels round differently, which is enough where random weights give nearly equal scores.
    torch.backends.cuda.enable_cudnn_sdp(False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map=device).eval()
    turn = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    with torch.inference_mode():
        ids = network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def case(model: Path, label: str, plan: Plan, arguments: argparse.Namespace, wanted: str) -> dict[str, Any]:
    """Serve under the plan's budget and measure."""
    (device, *_) = plan.devices
    print(f"\n{label}: budget {device.budget_bytes:,}, predicted peak {device.peak_bytes:,}", flush=True)
    flags = ["--budget", str(device.budget_bytes), "--context", str(plan.context)]
    started = time.monotonic()
    with Server(model, device.device, *flags) as server:
        ready_s = time.monotonic() - started
        answer = server.chat(prompt(arguments), arguments.tokens)
        measured = server.metric("snugfit_measured_peak_bytes")
        seen = dict(server.outside.peak_bytes)
        startup = server.metric("snugfit_process_startup_bytes")
    if "resident" in seen:
        seen["resident"] -= startup
    row = {
        "case": label,
        "budget_bytes": device.budget_bytes,
        "planned_bytes": device.peak_bytes,
        "measured_bytes": measured,
        "outside_bytes": seen,
        "offloaded_bytes": plan.offloaded_bytes,
        "within_budget": max(measured, *seen.values()) <= device.budget_bytes,
        "same_tokens": answer["choices"][0]["message"]["content"] == wanted,
        "completion_tokens": answer["usage"]["completion_tokens"],
        "ready_s": round(ready_s, 1),
    }
    share = 100 * measured / device.peak_bytes
    from_outside = ", ".join(f"{name} {n_bytes:,}" for name, n_bytes in seen.items())
    print(f"  measured {measured:,} ({share:.1f} % of planned), from outside: {from_outside}", flush=True)
    print(f"  within the budget: {row['within_budget']}, same tokens as generate: {row['same_tokens']}")
    return row


def prompt(arguments: argparse.Namespace) -> str:
    return (PROMPT * arguments.prompt_repeats).strip()


def rows(model: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    spec = checkpoint.read(model)
    wanted = elsewhere(oracle, model, arguments.device, prompt(arguments), arguments.tokens)
    found = []
    for label, budget_bytes in budgets(spec, arguments):
        try:
            plan = _plan(spec, budget_bytes, arguments)
        except BudgetExceeded as err:
            print(f"\n{label}: {err}", flush=True)
            smallest = err.smallest_bytes
            found.append({"case": label, "budget_bytes": budget_bytes, "smallest_bytes": smallest})
            label, plan = "the smallest budget", _plan(spec, smallest, arguments)
        try:
            found.append(case(model, label, plan, arguments, wanted))
        except SystemExit as err:
            found.append({"case": label, "budget_bytes": plan.devices[0].budget_bytes, "failed": str(err)})
    return found


def budgets(spec: checkpoint.ModelSpec, arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """(label, bytes): the sizes that were asked for, or else shares of the weights."""
    if arguments.budgets:
        yield from ((text, parse_bytes(text)) for text in arguments.budgets)
        return
    weights_bytes = make_plan(spec, MemoryBudget(("cpu",), {"cpu": 1 << 50})).weights_bytes
    yield from ((f"{share} %", weights_bytes * share // 100) for share in arguments.shares)


def _plan(spec: checkpoint.ModelSpec, budget_bytes: int, arguments: argparse.Namespace) -> Plan:
    """The plan that the server will make of the same flags."""
    budget = MemoryBudget.parse(str(budget_bytes), None, arguments.device, probe.machine())
    return make_plan(spec, budget, arguments.context)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--shares", type=int, nargs="+", default=[150, 60, 30], help="percent of the weights")
    sizes.add_argument("--budgets", nargs="+", help="sizes: 16GB 8GB")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt-repeats", type=int, default=1)
    arguments = parser.parse_args()
    found = rows(arguments.model, arguments)
    result = {"benchmark": "plan_vs_measured", "model": arguments.model.name, "device": arguments.device}
    print(json.dumps(result | {"rows": found}))


if __name__ == "__main__":
    main()
