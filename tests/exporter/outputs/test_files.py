"""files.py: every file without weights, planned from real folders; what its model card says of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.make_adapter import make as make_adapter
from exporter.outputs.files import files
from exporter.plan import make_plan
from exporter.spec import AdapterRef, ExportSpec
from exporter.staging import Finished
from exporter.writer import Written

DEMO = Path(__file__).resolve().parents[3] / "service" / "demo"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return make_adapter(DEMO, tmp_path_factory.mktemp("adapters") / "lora", rank=4)


@pytest.fixture
def noted(lora, tmp_path, monkeypatch):
    """Two adapters with something to note of each; the current folder is where they are."""
    for name in ("one", "two"):
        shutil.copytree(lora, tmp_path / "lab" / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / file, tmp_path / "lab" / name)
        path = tmp_path / "lab" / name / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": f"/home/trainer/{name}-base"}
        path.write_text(json.dumps(config))
        (path.parent / "LICENSE").write_text(name)
    path = tmp_path / "lab" / "two" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "lab"


def planned(base, *adapters):
    return make_plan(ExportSpec(str(base), Path("out"), tuple(AdapterRef(str(path)) for path in adapters)))


def written(plan):
    finished = {s.file: Finished(Written(s.file, s.n_bytes, "0" * 64), ()) for s in plan.shards}
    return dict(files(plan, finished))


def test_the_same_folders_give_the_same_bytes_however_their_paths_are_typed(noted):
    shutil.copytree(DEMO, "base")
    absolute = written(planned(Path("base").absolute(), noted / "one", noted / "two"))
    assert written(planned("base", "lab/one", "./lab/two/")) == absolute
    card = absolute["README.md"].decode()
    for note in ("one was trained on one-base", "that of two is taken", "two has a licence of its own"):
        assert note in card
    assert str(noted) not in card
    assert "/home" not in card


@pytest.mark.parametrize("value", [[], None, "Qwen2ForCausalLM", 7, [None], [["x"]], {}])
def test_a_config_that_names_no_architecture_is_no_obstacle(lora, value):
    plan = planned(DEMO, lora)
    plan = replace(plan, config={**plan.config, "architectures": value})
    card = written(plan)["README.md"].decode()
    assert "| architecture |" not in card
