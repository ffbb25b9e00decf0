"""The promise on a GPU: no more of it than the budget, the same answers, and all of it given back.

The built-in model, in a process of its own for each budget: CUDA's context is measured once in a process.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loader import checkpoint, probe
from loader.budget import MemoryBudget
from loader.errors import BudgetExceeded, OutOfMemory
from loader.placement import CUDA_GRAPHS_BYTES
from loader.plan import make_plan
from service.backend import Progress
from service.boot import start_backend
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "service" / "demo"
DEADLINE_S = 300
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: what runs on a GPU is NOT tested"
)
GB, MB, MiB = 10**9, 10**6, 2**20
CONTEXT, TOKENS = 1024, 32
IDS = list(range(5, 45))

# As service/boot.py does it.
SCRIPT = """
import json, sys
import pynvml
from loader import checkpoint, probe
from loader.budget import MemoryBudget
from loader.plan import make_plan

folder, budget_bytes, context, ids, tokens = sys.argv[1], *map(json.loads, sys.argv[2:])
budget = MemoryBudget.parse(str(budget_bytes), None, "cuda", probe.machine())
plan = make_plan(checkpoint.read(folder), budget, context)
pynvml.nvmlInit()
card = probe.visible_handles(None)[0]
used = lambda: pynvml.nvmlDeviceGetMemoryInfo(card).used
before = used()

import torch
from loader.load import load
from service.engine.rows import Row
from service.engine.runner import make_runner
from service.nvml import Nvml

loaded = load(plan)
runner = make_runner(loaded.model, loaded.device, plan)
runner.rehearse()
loaded.recount()
rehearsed = loaded.measured_peak_bytes()["cuda:0"]
tables = tuple([*range(-(-context // plan.kv.block_tokens))] for _ in plan.kv.groups)
choose = lambda new, start: int(runner.step([Row(new, start, tables, True)])[0].argmax())
chosen = [choose(ids, 0)]
while len(chosen) < tokens:
    chosen.append(choose(chosen[-1:], len(ids) + len(chosen) - 1))
measured = loaded.measured_peak_bytes()["cuda:0"]
(gpu,) = [device for device in Nvml().read() if device.device == "cuda:0"]
reserved = torch.cuda.memory_reserved()
peak = torch.cuda.max_memory_reserved()
on_card = used() - before
runner.close()
loaded.close()
print(json.dumps({
    "tokens": chosen, "rehearsed": rehearsed, "measured": measured, "context": measured - peak,
    "card": on_card, "process": gpu.process_bytes, "reserved": reserved,
    "kept": torch.cuda.memory_reserved(),
}))
"""


def plan_for(budget_bytes):
    budget = MemoryBudget.parse(str(budget_bytes), None, "cuda", probe.machine())
    return make_plan(checkpoint.read(DEMO), budget, CONTEXT)


def smallest():
    with pytest.raises(BudgetExceeded) as caught:
        plan_for(100 * MB)
    return caught.value.smallest_bytes


def exact():
    """What is planned when there is more than enough."""
    return plan_for(2 * GB).devices[0].peak_bytes


@pytest.fixture(scope="module")
def run():
    """`run(budget_bytes)`: load, rehearse and generate in a new process; what it measured."""
    done = {}

    def start(budget_bytes):
        if budget_bytes not in done:
            words = [str(DEMO), *map(json.dumps, (budget_bytes, CONTEXT, IDS, TOKENS))]
            process = subprocess.run(
                [sys.executable, "-c", SCRIPT, *words],
                capture_output=True, text=True, timeout=DEADLINE_S, cwd=ROOT, check=False,
            )  # fmt: skip
            assert process.returncode == 0, process.stderr
            done[budget_bytes] = json.loads(process.stdout.splitlines()[-1])
        return done[budget_bytes]

    return start


@pytest.fixture(scope="module")
def generated():
    """The tokens that transformers' own greedy `generate` gives on the same GPU with the same attention."""
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.enable_cudnn_sdp(False)  # as the runner does
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto", device_map="cuda:0")
    ids = torch.tensor([IDS], device="cuda:0")
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1
    )
    return out[0, len(IDS) :].tolist()


@pytest.fixture(params=["resident", "exactly the plan", "offloaded"])
def budget_bytes(request):
    sizes = {"resident": lambda: 2 * GB, "exactly the plan": exact, "offloaded": smallest}
    return sizes[request.param]()


def test_no_more_than_the_budget_is_used_and_the_tokens_are_those_of_generate(run, generated, budget_bytes):
    plan, result = plan_for(budget_bytes), run(budget_bytes)
    assert (plan.offloaded_bytes > 0) == (budget_bytes < exact())
    assert result["tokens"] == generated
    assert result["measured"] <= plan.devices[0].peak_bytes <= budget_bytes
    assert result["card"] <= budget_bytes
    assert result["measured"] - result["rehearsed"] < 8 * MiB  # a rehearsal has seen the worst


def test_what_is_measured_is_what_the_driver_counts(run, budget_bytes):
    result = run(budget_bytes)
    assert result["context"] + result["reserved"] == pytest.approx(result["card"], abs=16 * MiB)
    if result["process"] is not None:
        assert result["process"] == pytest.approx(result["card"], abs=16 * MiB)


def test_the_context_takes_about_what_is_planned_for_it(run, budget_bytes):
    planned = plan_for(budget_bytes).budget.context_bytes
    graphs = CUDA_GRAPHS_BYTES if budget_bytes >= exact() else 0
    assert 0.5 * planned < run(budget_bytes)["context"] < planned + graphs


def test_closing_gives_the_memory_back(run, budget_bytes):
    assert run(budget_bytes)["kept"] <= 40 * MiB  # cuBLAS keeps its workspace


def test_what_passes_the_cap_is_refused_with_the_plan_and_not_by_cuda():
    plan = plan_for(2 * GB)
    (group,) = plan.kv.groups
    too_many = replace(group, blocks=3 * GB // (plan.kv_bytes_per_token * plan.kv.block_tokens))
    too_large = replace(plan, kv=replace(plan.kv, groups=(too_many,)))
    with pytest.raises(OutOfMemory, match="while rehearsing the largest request; the plan counted on a peak"):
        start_backend(Settings(device="cuda"), too_large, Progress())
    start_backend(Settings(device="cuda"), plan, Progress()).close()  # nothing of it is left
