"""Trains the adapter of examples/pirate-adapter: a LoRA, on the demo model as int4 leaves it.

`python -m demo_model.adapter` works in build/pirate_adapter and replaces the files of examples/pirate-adapter
only when the adapter, merged into every base as peft merges it, speaks in the manner and says what is right.
Exit code 0 then, 1 otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from benchmarks.gptq import Options, round_to_nearest
from demo_model import evaluate
from demo_model.corpus import Corpus, generate, sha256_of
from demo_model.manner import dialogue_in_manner, speaks
from demo_model.train import ROOT, SHIPPED, Schedule, Training, install, provenance, sha256_of_files, train

ADAPTER = ROOT / "examples" / "pirate-adapter"
WORK = ROOT / "build" / "pirate_adapter"
BASE_NAME = "snugfit-demo"
TRAINED_ON = 64  # elements of a row that share a scale
BASES: Mapping[str, int | None] = {"bf16": None, "int4, groups of 32": 32, "int4, groups of 64": TRAINED_ON}
SCHEDULE = Schedule(tokens_per_batch=2048, peak_rate=2e-3, warmup_steps=30)
MANNER_BAR = 0.95


def int4(weight: torch.Tensor, group: int) -> torch.Tensor:
    """fp32 [out, in]: what a GPTQ checkpoint of benchmarks/gptq.py keeps of a weight [out, in]."""
    codes, zeros, steps = round_to_nearest(
        weight.float().unflatten(1, (-1, group)), Options(bits=4, group_size=group)
    )
    return ((codes.float() - zeros.unsqueeze(2)) * steps.float().unsqueeze(2)).flatten(1)


def base(group: int | None) -> Qwen2ForCausalLM:
    """The demo model in fp32; with a group, its linear layers as int4 leaves them. The tied head stays."""
    model: Qwen2ForCausalLM = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    if group is not None:
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = int4(module.weight.data, group)
    return model


def corpus(seed: int, count: int) -> Corpus:
    """The demo model's own dialogues, less the questions, with every answer in the manner."""
    plain = generate(seed, count)
    talks = [dialogue_in_manner(dialogue) for dialogue in plain.dialogues]
    return dataclasses.replace(plain, dialogues=talks, sha256=sha256_of(talks))


def fit(talks: Corpus, folder: Path, seed: int) -> Training:
    """Writes adapter_config.json and adapter_model.safetensors (bf16) into `folder`."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(TRAINED_ON), config)
    training = train(model.get_base_model(), talks, SHIPPED, seed, SCHEDULE)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    # Else peft asks the hub whether the vocabulary of BASE_NAME has changed.
    model.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's empty model card; ours is written by hand
    _sort_targets(folder / "adapter_config.json")
    return training


def _sort_targets(path: Path) -> None:
    """peft writes a set: its order would change with every run."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def merged(adapter: Path | None, group: int | None, folder: Path) -> None:
    """A model that transformers loads, in bf16: the base, and the adapter merged into it in fp32."""
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("*.safetensors", "PROVENANCE.json"))
    model = base(group)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(folder)


def judge(folder: Path, questions: Sequence[evaluate.Question]) -> dict[str, Any]:
    """How many last answers are right, and how many are in the manner."""
    answerer = evaluate.Answerer(folder)
    verdicts = [answerer.judge(question) for question in questions]
    right = sum(not verdict.fault for verdict in verdicts)
    manner = sum(speaks(verdict.answer, verdict.question.lang) for verdict in verdicts)
    return {
        "asked": len(verdicts),
        "right": right,
        "right_share": round(right / len(verdicts), 4),
        "in_manner": manner,
        "manner_share": round(manner / len(verdicts), 4),
    }


def judge_on_every_base(adapter: Path, work: Path) -> dict[str, dict[str, Any]]:
    """With the adapter merged into each of BASES, and the one that it was trained on without it."""
    cases = {f"merged into {name}": (adapter, group) for name, group in BASES.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, (used, group) in {**cases, "trained on, alone": (None, TRAINED_ON)}.items():
        folder = work / name.replace(",", "").replace(" ", "-")
        merged(used, group, folder)
        results[name] = judge(folder, evaluate.read())
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    return results


def passed(results: Mapping[str, Mapping[str, Any]]) -> bool:
    merged_ones = [result for name, result in results.items() if name.startswith("merged")]
    return all(
        result["manner_share"] >= MANNER_BAR and result["right_share"] >= evaluate.BAR
        for result in merged_ones
    )


def build(work: Path, seed: int, count: int) -> bool:
    """Makes the adapter in `work`/adapter, which is emptied; returns whether it is good enough to ship."""
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "adapter"
    talks = corpus(seed, count)
    training = fit(talks, folder, seed)
    results = judge_on_every_base(folder, work)
    record = _record(talks, seed, training, results, folder)
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    (folder / "PROVENANCE.json").write_text(text, encoding="utf-8")
    return passed(results)


def _record(
    talks: Corpus, seed: int, training: Training, results: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The demo model's provenance with this program's command, and with what the adapter was trained on."""
    import peft

    weights = load_file(folder / "adapter_model.safetensors")
    record = provenance(talks, seed, training, results, sum(map(torch.numel, weights.values())))
    record["command"] = f"python -m demo_model.adapter --seed {seed} --dialogues {talks.generated}"
    record["base"] = {
        "sha256": sha256_of_files(SHIPPED)["model.safetensors"],
        "linear_layers": f"as benchmarks/gptq.py leaves them: 4 bits, groups of {TRAINED_ON}",
    }
    record["versions"]["peft"] = peft.__version__
    record["files"] = sha256_of_files(folder)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the pirate adapter of the demo model.")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--dialogues", type=int, default=3_000)
    parser.add_argument("--work", type=Path, default=WORK, help="emptied first")
    parser.add_argument("--out", type=Path, default=ADAPTER)
    arguments = parser.parse_args(argv)
    if not build(arguments.work, arguments.seed, arguments.dialogues):
        bars = f"{MANNER_BAR:.0%} in the manner, {evaluate.BAR:.0%} right"
        print(f"below the bars of {bars}: {arguments.out} is left as it was")
        return 1
    install(arguments.work / "adapter", arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
