"""KServe's resources against the types of KServe's own SDK, strictly: a field that no type has is a fault.

The SDK's models are made from the types that the CRDs are made from. They are read, not imported: the wheels
are kept as they come. They lack what only the CRDs or KServe's webhooks say: that a text has to be there, for
one, or what it may be.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from zipfile import ZipFile

from jsonschema import Draft202012Validator

from deployment import tools
from deployment.manifests.objects import Json, title, wrong

# Of each kind: its apiVersion, and the model that describes it.
KINDS = {
    "ServingRuntime": ("serving.kserve.io/v1alpha1", "V1alpha1ServingRuntime"),
    "InferenceService": ("serving.kserve.io/v1beta1", "V1beta1InferenceService"),
}

_PLAIN: Mapping[str, Json] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "datetime": {"type": "string"},
    "V1Time": {"type": "string"},
    "object": {},  # a number or a text, such as a port, or anything
    "ResourceQuantity": {"type": ["string", "number"]},
    "V1beta1MetricQuantity": {"type": ["string", "number"]},
}
_QUANTITIES = ("limits", "requests")  # that the models take for texts
_LIST, _DICT = re.compile(r"list\[(.+)\]"), re.compile(r"dict[(\[]str, (.+)[)\]]")
_TABLE = r"    {} = (\{{.*?\n    \}})"
_REQUIRED = re.compile(r"Invalid value for `(\w+)`, must not be `None`")
_FULL_NAME = re.compile(r"K8sIoApi[A-Z][a-z]+(V\d\w+)")


def problems(documents: Sequence[Json]) -> list[str]:
    """A sentence for each fault of the documents whose kind is in KINDS, or that it was not checked."""
    known = [document for document in documents if document.get("kind") in KINDS]
    wheels = tools.kserve_sdk() if known else ()
    if not wheels:
        reason = "it was not checked: KServe's SDK cannot be fetched"
        return [f"{title(document)}: {reason}" for document in known]
    models = _Models(wheels)
    return [sentence for document in known for sentence in _faults(document, models)]


def _faults(document: Json, models: _Models) -> Iterator[str]:
    version, model = KINDS[document["kind"]]
    if document.get("apiVersion") != version:
        yield wrong(document, "apiVersion", document.get("apiVersion"), f"it is {version}")
    schema = {**models.reference(model), "$defs": models.definitions}
    errors = Draft202012Validator(schema).iter_errors(document)
    for error in sorted(errors, key=lambda error: error.json_path):
        reason = error.message if error.validator else "the SDK lacks its type, so that it cannot be checked"
        yield f"{title(document)}: {error.json_path.removeprefix('$.')}: {reason}"


class _Models:
    """JSON schemas of the models in some wheels; `definitions` has those asked for, and their parts."""

    def __init__(self, wheels: Sequence[Path]) -> None:
        self.definitions: dict[str, Json | bool] = {}
        self._texts: dict[str, str] = {}
        for wheel in reversed(wheels):  # KServe's own replace those of Kubernetes
            with ZipFile(wheel) as files:
                for name in files.namelist():
                    if "/models/" in name and "/aio/" not in name:
                        self._texts[Path(name).stem.replace("_", "")] = files.read(name).decode()

    def reference(self, type_name: str, field: str = "") -> Json:
        """The schema of "str", "list[V1Volume]", "dict(str, int)" or the name of a model."""
        if found := _LIST.fullmatch(type_name):
            return {"type": "array", "items": self.reference(found[1])}
        if found := _DICT.fullmatch(type_name):
            inner = "ResourceQuantity" if field in _QUANTITIES else found[1]
            return {"type": "object", "additionalProperties": self.reference(inner)}
        if type_name in _PLAIN:
            return dict(_PLAIN[type_name])
        model = _FULL_NAME.sub(r"\1", type_name)
        if model not in self.definitions:
            self.definitions[model] = {}  # a model may hold itself
            self.definitions[model] = self._definition(model)
        return {"$ref": f"#/$defs/{model}"}

    def _definition(self, model: str) -> Json | bool:
        if model.lower() not in self._texts:
            return False  # two models are not in the wheel: what is of their type is refused, not passed
        text = self._texts[model.lower()]
        types, written = _table(text, "openapi_types"), _table(text, "attribute_map")
        return {
            "type": "object",
            "properties": {written[own]: self.reference(kind, own) for own, kind in types.items()},
            "required": sorted({written[own] for own in _REQUIRED.findall(text)}),
            "additionalProperties": False,
        }


def _table(text: str, name: str) -> dict[str, str]:
    """The dict that a model calls `name`."""
    found = re.search(_TABLE.format(name), text, re.DOTALL)
    table: dict[str, str] = ast.literal_eval(found[1]) if found else {}
    return table
