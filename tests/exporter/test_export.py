"""A whole export, in this process: what stands in the folder, and every way to end otherwise."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.make_adapter import make as make_adapter
from exporter.errors import BadSpec, VerificationFailed
from exporter.export import export
from exporter.listener import Listener
from exporter.plan import make_plan
from exporter.spec import AdapterRef, ExportSpec
from exporter.staging import JOURNAL, MODEL, staging_folder
from exporter.verify import verify
from loader import checkpoint

DEMO = Path(__file__).resolve().parents[2] / "service" / "demo"
SHARD_BYTES = 1_880_000


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter for the demo model, on all of its linear layers."""
    return make_adapter(DEMO, tmp_path_factory.mktemp("adapters") / "lora", rank=4)


@pytest.fixture
def spec(adapter, tmp_path):
    return ExportSpec(str(DEMO), tmp_path / "out", (AdapterRef(str(adapter)),), shard_bytes=SHARD_BYTES)


@pytest.fixture(scope="module")
def undisturbed(adapter, tmp_path_factory):
    """The folder of an export that nothing went wrong with."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    export(make_plan(ExportSpec(str(DEMO), out, (AdapterRef(str(adapter)),), shard_bytes=SHARD_BYTES)))
    return out


class Stop(Listener):
    """Ctrl-C as soon as something is true of the progress."""

    def __init__(self, when):
        self._when = when

    def progress(self, *facts):
        if self._when(*facts):
            raise KeyboardInterrupt


AT_THE_END = Stop(lambda done, total, _shard: done == total)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


# What is written


def test_every_tensor_is_bit_by_bit_what_peft_merges(undisturbed, adapter):
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto")
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    ours = tensors(undisturbed)
    assert set(merged) - set(ours) == {"lm_head.weight"}  # tied: written once
    assert all(torch.equal(ours[name].view(torch.int16), merged[name].view(torch.int16)) for name in ours)


def test_transformers_loads_it_as_it_is(undisturbed):
    model, info = AutoModelForCausalLM.from_pretrained(undisturbed, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    turn = [{"role": "user", "content": "Who are you?"}]
    ids = [
        AutoTokenizer.from_pretrained(f).apply_chat_template(turn)["input_ids"] for f in (undisturbed, DEMO)
    ]
    assert ids[0] == ids[1]


def test_the_loader_reads_it_and_a_layer_is_one_run_of_bytes(undisturbed):
    spec = checkpoint.read(undisturbed)
    for number in range(6):
        layer = [t for t in spec.tensors if t.name.startswith(f"model.layers.{number}.")]
        assert len({t.file for t in layer}) == 1
        assert sum(t.n_bytes for t in layer) == max(t.end for t in layer) - min(t.start for t in layer)


def test_no_shard_is_larger_than_asked(undisturbed):
    sizes = [path.stat().st_size for path in undisturbed.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) <= SHARD_BYTES


def test_the_manifest_proves_that_the_adapter_is_in(undisturbed):
    found = verify(undisturbed)
    assert len(found.changes) == 42
    assert all(change.changed > change.elements / 2 for change in found.changes)


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(undisturbed, adapter, tmp_path):
    base, lora = tmp_path / "elsewhere" / "demo", tmp_path / "elsewhere" / "lora"
    shutil.copytree(DEMO, base)
    shutil.copytree(adapter, lora)
    out = tmp_path / "again"
    export(make_plan(ExportSpec(str(base), out, (AdapterRef(str(lora)),), shard_bytes=SHARD_BYTES)))
    assert contents(out) == contents(undisturbed)


def test_several_adapters_are_summed_with_their_weights_and_rounded_once(adapter, tmp_path):
    other = make_adapter(DEMO, tmp_path / "other", rank=8, seed=1)
    refs = (AdapterRef(str(adapter), 0.5), AdapterRef(str(other), -1.0))
    export(make_plan(ExportSpec(str(DEMO), tmp_path / "out", refs)))
    name = "model.layers.3.mlp.up_proj"
    wanted = load_file(DEMO / "model.safetensors")[f"{name}.weight"].float()
    for folder, weight in ((adapter, 0.5), (other, -1.0)):
        lora = load_file(folder / "adapter_model.safetensors")
        a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        wanted += b @ a * (2 * weight)
    assert torch.equal(tensors(tmp_path / "out")[f"{name}.weight"], wanted.bfloat16())


def test_without_an_adapter_the_base_only_becomes_bf16(tmp_path):
    export(make_plan(ExportSpec(str(DEMO), tmp_path / "out")))
    before, after = load_file(DEMO / "model.safetensors"), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


# What is there already


def test_a_second_run_finds_that_all_is_done(spec):
    first = export(make_plan(spec))
    before = {path: path.stat().st_mtime_ns for path in spec.out.iterdir()}
    again = export(make_plan(spec))
    assert (first.was_done, again.was_done) == (False, True)
    assert again.manifest.files == first.manifest.files
    assert {path: path.stat().st_mtime_ns for path in spec.out.iterdir()} == before


def test_an_adapter_that_changes_nothing_is_a_failure_and_not_a_silent_copy(spec, adapter, tmp_path):
    untrained = shutil.copytree(adapter, tmp_path / "untrained")
    file = untrained / "adapter_model.safetensors"
    values = {name: v * ("lora_A" in name) for name, v in load_file(file).items()}
    save_file(values, file)
    with pytest.raises(VerificationFailed, match="was the adapter trained"):
        export(make_plan(replace(spec, adapters=(AdapterRef(str(untrained)),))))
    assert not spec.out.exists()


def test_a_file_that_somebody_puts_there_meanwhile_is_not_removed(spec):
    def put(done, total, _shard):
        if done == total:
            spec.out.mkdir()
            (spec.out / "thesis.txt").write_text("years of work")

    with pytest.raises(BadSpec, match="is not empty"):
        export(make_plan(spec), Stop(put))
    assert (spec.out / "thesis.txt").read_text() == "years of work"


def test_what_a_kill_left_beside_a_finished_export_goes_with_the_next_run(spec):
    export(make_plan(spec))
    staging_folder(spec.out).mkdir()
    assert export(make_plan(spec)).was_done
    assert not staging_folder(spec.out).exists()


# Cut short


KILLER = """
import os, random, signal, sys
from pathlib import Path
import torch
from exporter import staging, writer
from exporter.export import export
from exporter.plan import make_plan
from exporter.spec import AdapterRef, ExportSpec

torch.set_num_threads(1)
base, adapter, out, kills, seed = sys.argv[1:]
spec = ExportSpec(base, Path(out), (AdapterRef(adapter),), shard_bytes=1_880_000)
CALLS = ("write", "fsync", "fdatasync", "open", "close", "rename", "mkdir", "unlink", "replace", "rmdir")

def run(deadline):
    # Ends itself by SIGKILL at that call of the system; gives the number of calls when it came to the end.
    calls = 0
    def counted(call):
        def wrapper(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == deadline:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return wrapper
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    export(make_plan(spec))
    return calls

def child(deadline):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, str(run(deadline)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as stream:
        return stream.read()

import shutil
total = int(child(0))
shutil.rmtree(out)
dice = random.Random(int(seed))
root = staging.staging_folder(spec.out)
journal, model = root / staging.JOURNAL, root / staging.MODEL
for _ in range(int(kills)):
    done = child(dice.randrange(1, total))
    if done:
        shutil.rmtree(out)
        continue
    in_journal = max(journal.read_text().count("\\n") - 1, 0) if journal.exists() else 0
    shards = len(list(model.glob("*.safetensors"))) if model.exists() else in_journal
    print(Path(out).exists(), len(list(Path(out).glob("*"))), shards - in_journal, flush=True)
while not child(0):
    pass
"""


def test_killed_at_twenty_random_points_it_comes_to_the_same_end(undisturbed, adapter, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, str(DEMO), str(adapter), str(out), "20", "7"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    points = [line.split() for line in killed.stdout.splitlines()]
    assert len(points) >= 10  # the others came to their end: the last calls are after the rename
    for is_there, n_files, unfinished in points:
        assert is_there == "False" or int(n_files) == len(contents(undisturbed))  # whole, or not there
        assert int(unfinished) <= 1  # what the next run writes again
    assert contents(out) == contents(undisturbed)
    assert not staging_folder(out).exists()


def test_a_run_that_was_cut_short_keeps_its_finished_shards(spec, undisturbed, monkeypatch):
    stopped = make_plan(spec)

    with pytest.raises(KeyboardInterrupt):
        export(stopped, Stop(lambda _done, _total, shard: shard.startswith("model-00003")))
    assert not spec.out.exists()
    done = export(make_plan(spec))
    assert done.kept_shards == 2
    assert contents(spec.out) == contents(undisturbed)


def test_a_shard_that_was_damaged_in_between_is_written_again(spec, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        export(make_plan(spec), AT_THE_END)
    journal = staging_folder(spec.out) / JOURNAL
    kept = [json.loads(line)["written"]["file"] for line in journal.read_text().splitlines()[1:]]
    with (staging_folder(spec.out) / MODEL / kept[0]).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"!")
    assert export(make_plan(spec)).kept_shards == len(kept) - 1
    assert contents(spec.out) == contents(undisturbed)


def test_another_adapter_in_between_starts_over(spec, undisturbed, tmp_path):
    other = make_adapter(DEMO, tmp_path / "other", rank=4, seed=5)
    with pytest.raises(KeyboardInterrupt):
        export(make_plan(replace(spec, adapters=(AdapterRef(str(other)),))), AT_THE_END)
    assert export(make_plan(spec)).kept_shards == 0
    assert contents(spec.out) == contents(undisturbed)
