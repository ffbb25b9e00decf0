"""Planned and measured memory on the CPU: python -m benchmarks.plan_vs_measured MODEL [--shares 150 60 30].

Serves MODEL under budgets that are shares of its weights, asks it over HTTP, and compares: the plan's peak,
the peak that the server measured, the peak of its resident memory sampled from outside (pages of files
included) above what it held before loading, and the budget; and the greedy tokens with those of
transformers' generate. A budget under which the plan is refused is a row that says what the smallest one is,
and that one is served too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.server import Server
from loader import checkpoint
from loader.budget import MemoryBudget
from loader.errors import BudgetExceeded
from loader.plan import Plan, make_plan

PROMPT = "Tell me, in a few plain words, how a model that is larger than the memory can still be run. "


def oracle(model: Path, prompt: str, max_tokens: int) -> str:
    """The greedy answer of transformers' own generate, as text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    turn = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def case(model: Path, label: str, plan: Plan, arguments: argparse.Namespace, wanted: str) -> dict[str, Any]:
    """Serve under the plan's budget and measure."""
    (device, *_) = plan.devices
    print(f"\n{label}: budget {device.budget_bytes:,}, predicted peak {device.peak_bytes:,}", flush=True)
    flags = ["--device", "cpu", "--budget", str(device.budget_bytes), "--context", str(arguments.context)]
    with Server(model, *flags) as server:
        answer = server.chat(prompt(arguments), arguments.tokens)
        measured = server.metric("snugfit_measured_peak_bytes")
        outside = server.resident.peak_bytes - server.metric("snugfit_process_startup_bytes")
    row = {
        "case": label,
        "budget_bytes": device.budget_bytes,
        "planned_bytes": device.peak_bytes,
        "measured_bytes": measured,
        "outside_bytes": outside,
        "offloaded_bytes": plan.offloaded_bytes,
        "within_budget": max(measured, outside) <= device.budget_bytes,
        "same_tokens": answer["choices"][0]["message"]["content"] == wanted,
        "completion_tokens": answer["usage"]["completion_tokens"],
    }
    share = 100 * measured / device.peak_bytes
    print(f"  measured {measured:,} ({share:.1f} % of planned), from outside {outside:,}", flush=True)
    print(f"  within the budget: {row['within_budget']}, same tokens as generate: {row['same_tokens']}")
    return row


def prompt(arguments: argparse.Namespace) -> str:
    return (PROMPT * arguments.prompt_repeats).strip()


def rows(model: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    spec = checkpoint.read(model)
    weights_bytes = make_plan(spec, MemoryBudget(("cpu",), {"cpu": 1 << 50})).weights_bytes
    wanted = oracle(model, prompt(arguments), arguments.tokens)
    found = []
    for share in arguments.shares:
        label, budget_bytes = f"{share} %", weights_bytes * share // 100
        try:
            plan = _plan(spec, budget_bytes, arguments.context)
        except BudgetExceeded as err:
            print(f"\n{label}: {err}", flush=True)
            smallest = err.smallest_bytes
            found.append({"case": label, "budget_bytes": budget_bytes, "smallest_bytes": smallest})
            label, plan = "the smallest budget", _plan(spec, smallest, arguments.context)
        found.append(case(model, label, plan, arguments, wanted))
    return found


def _plan(spec: checkpoint.ModelSpec, budget_bytes: int, context: int) -> Plan:
    return make_plan(spec, MemoryBudget(("cpu",), {"cpu": budget_bytes}), context)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--shares", type=int, nargs="+", default=[150, 60, 30], help="percent of the weights")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt-repeats", type=int, default=1)
    arguments = parser.parse_args()
    found = rows(arguments.model, arguments)
    print(json.dumps({"benchmark": "plan_vs_measured", "model": arguments.model.name, "rows": found}))


if __name__ == "__main__":
    main()
