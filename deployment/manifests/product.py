"""What only this product's manifests can have wrong: its configuration, and the time it needs to stop."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from deployment.manifests.containers import is_port
from deployment.manifests.objects import Json, Objects, Pod, listed, mapping, name, namespace, title, wrong
from exporter.errors import BadSpec
from exporter.spec import from_toml, make_spec
from loader.budget import MemoryBudget
from loader.errors import BadBudget
from loader.probe import Gpu, Machine
from service.settings import ALTERNATIVES, ENV_PREFIX, SECRET_FIELDS, Settings, explain

CONFIG_FILE = "/etc/snugfit/snugfit.toml"
CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"
# Files of the container: they are not on this machine, and Settings looks.
_FILES = ("api_key_file", "chat_template")
_DEFAULT_GRACE_SECONDS = 30
# Whose memory is no reason to refuse a budget.
_GPUS = tuple(Gpu(f"cuda:{number}", "any", f"GPU-{number}", 2**40, 2**40, 100) for number in range(16))
_LARGE = Machine(ram_total_bytes=2**50, ram_free_bytes=2**50, gpus=_GPUS)
_SLEEP = re.compile(r"\bsleep\s+(\d+)\b")


@dataclass(frozen=True)
class MountedFile:
    """A file of a ConfigMap as a container sees it."""

    source: Json
    key: str
    text: str

    def says(self, fault: str) -> str:
        return f"{title(self.source)}: data[{self.key}] {fault}"


@dataclass(frozen=True)
class Service:
    """A container that runs `snugfit serve`, with what its file and its environment say."""

    pod: Pod
    path: str
    container: Json
    file: MountedFile | None
    environment: Mapping[str, str]  # a value from elsewhere is ""


def check(objects: Objects) -> Iterator[str]:
    for pod in objects.pods:
        for path, container in pod.containers("containers"):
            if pod.owner.get("kind") in ("Job", "CronJob"):
                yield from _export(objects, pod, path, container)
            elif service := _service(objects, pod, path, container):
                yield from _settings(service)
                yield from _links(objects, service)


def mounted(objects: Objects, pod: Pod, container: Json, file: str) -> MountedFile | None:
    """The ConfigMap's entry that a container finds at the path `file`."""
    volumes = {volume.get("name"): volume for _, volume in listed(pod.spec, "volumes")}
    for _, mount in listed(container, "volumeMounts"):
        volume, place = volumes.get(mount.get("name"), {}), PurePosixPath(str(mount.get("mountPath")))
        source = objects.find("ConfigMap", str(mapping(volume, "configMap").get("name")), near=pod.owner)
        key = str(mount.get("subPath", PurePosixPath(file).name))
        is_there = place == PurePosixPath(file) if "subPath" in mount else place == PurePosixPath(file).parent
        if source and is_there and key in mapping(source, "data"):
            return MountedFile(source, key, str(mapping(source, "data")[key]))
    return None


def _service(objects: Objects, pod: Pod, path: str, container: Json) -> Service | None:
    environment = {
        str(variable.get("name")): str(variable.get("value", ""))
        for _, variable in listed(container, "env")
        if str(variable.get("name")).upper().startswith(ENV_PREFIX)
    }
    file = mounted(objects, pod, container, environment.get(CONFIG_VARIABLE) or CONFIG_FILE)
    return Service(pod, path, container, file, environment) if file or environment else None


# Settings


def _settings(service: Service) -> Iterator[str]:
    if service.environment.get(CONFIG_VARIABLE) and not service.file:
        value = service.environment[CONFIG_VARIABLE]
        yield service.pod.wrong(
            f"{service.path}.env.{CONFIG_VARIABLE}", value, "no ConfigMap is mounted there"
        )
    values = yield from _values(service)
    try:
        settings = Settings(**{key: value for key, value in values.items() if key not in _FILES})
    except ValidationError as err:
        for detail in err.errors(include_url=False, include_context=False):
            field = str(detail["loc"][0])
            yield _say(service, field, values[field], f"accepted: {explain(field)['accepts']}")
        return
    yield from _budget(service, settings)
    yield from _grace(service, settings)
    yield from _port(service, settings)


def _budget(service: Service, settings: Settings) -> Iterator[str]:
    """The loader reads sizes when the settings are accepted already."""
    try:
        MemoryBudget.parse(settings.budget, settings.max_memory, settings.device, _LARGE)
    except BadBudget as err:
        field = "budget" if settings.max_memory is None else "max_memory"
        yield _say(service, field, getattr(settings, field), f"the service would not start: {err}")


def _values(service: Service) -> Generator[str, None, dict[str, Any]]:
    """Yields sentences, and returns the settings that there are: the environment over the file."""
    found: dict[str, Any] = {}
    if service.file:
        try:
            found = tomllib.loads(service.file.text)
        except tomllib.TOMLDecodeError as err:
            yield service.file.says(f"is not TOML: {err}")
    for field in SECRET_FIELDS & found.keys():
        yield _say(service, field, found[field], "keys stand in a Secret: name its file with api_key_file")
    if all(field in found for field in ALTERNATIVES):
        yield _say(service, ALTERNATIVES[1], found[ALTERNATIVES[1]], f"give it or {ALTERNATIVES[0]}")
        del found[ALTERNATIVES[1]]
    variables = {
        variable[len(ENV_PREFIX) :].lower(): value
        for variable, value in service.environment.items()
        if variable != CONFIG_VARIABLE
    }
    for field, value in {**found, **variables}.items():
        if field not in Settings.model_fields:
            yield _say(service, field, value, "there is no such setting: the service would not start")
        if variables.get(field) and field in found:
            yield _say(service, field, value, "the file has it too and would not be heard: say it once")
    found.update({field: value for field, value in variables.items() if value})  # "" counts as not set
    return {field: value for field, value in found.items() if field in Settings.model_fields}


def _say(service: Service, field: str, value: object, right: str) -> str:
    variable = f"{ENV_PREFIX}{field.upper()}"
    value = "…" if field in SECRET_FIELDS else value
    if variable in service.environment or not service.file:
        return service.pod.wrong(f"{service.path}.env.{variable}", value, right)
    return wrong(service.file.source, f"data[{service.file.key}].{field}", value, right)


def _grace(service: Service, settings: Settings) -> Iterator[str]:
    """The kubelet counts the preStop hook too, and kills when the time is over."""
    grace = service.pod.spec.get("terminationGracePeriodSeconds", _DEFAULT_GRACE_SECONDS)
    delay = _delay_seconds(mapping(service.container, "lifecycle", "preStop"))
    needed = delay + settings.drain_seconds
    if not isinstance(grace, int) or grace <= needed:
        drain = f"{settings.drain_seconds:g}"
        right = f"preStop takes {delay} s and drain_seconds is {drain}: it has to be above {needed:g}"
        yield service.pod.wrong(f"{service.pod.path}.terminationGracePeriodSeconds", grace, right)


def _delay_seconds(hook: Json) -> int:
    """How long a preStop hook sleeps: sleep.seconds, or "sleep N" in its command."""
    words = " ".join(map(str, mapping(hook, "exec").get("command") or []))
    found = _SLEEP.search(words)
    return int(mapping(hook, "sleep").get("seconds") or (found[1] if found else 0))


def _port(service: Service, settings: Settings) -> Iterator[str]:
    ports = [port.get("containerPort") for _, port in listed(service.container, "ports")]
    if ports and all(map(is_port, ports)) and settings.port not in ports:
        right = f"by its configuration the service listens on {settings.port}"
        yield service.pod.wrong(f"{service.path}.ports[*].containerPort", ports, right)


def _links(objects: Objects, service: Service) -> Iterator[str]:
    """Beside a Service named snugfit the kubelet sets SNUGFIT_PORT=tcp://…, which the service refuses."""
    if service.pod.spec.get("enableServiceLinks") is False:
        return
    for document in objects.of("Service"):
        variables = name(document).upper().replace("-", "_") + "_"
        if variables.startswith(ENV_PREFIX) and namespace(document) == namespace(service.pod.owner):
            right = f"it has to be false: Service {name(document)} would set {variables}PORT"
            value = service.pod.spec.get("enableServiceLinks")
            yield service.pod.wrong(f"{service.pod.path}.enableServiceLinks", value, right)


# The exporter's job


def _export(objects: Objects, pod: Pod, path: str, container: Json) -> Iterator[str]:
    for field in ("command", "args"):
        words = [str(word) for word in container.get(field) or []]
        if "--config" in words[:-1]:
            place = words[words.index("--config") + 1]
            yield from _spec_file(objects, pod, f"{path}.{field}", container, place)


def _spec_file(objects: Objects, pod: Pod, path: str, container: Json, place: str) -> Iterator[str]:
    file = mounted(objects, pod, container, place)
    if file is None:
        yield pod.wrong(path, f"--config {place}", "no ConfigMap is mounted there")
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder, PurePosixPath(place).name)
        copy.write_text(file.text, encoding="utf-8")
        try:
            make_spec(from_toml(copy))
        except BadSpec as err:
            yield file.says(f"is refused by the exporter: {err}".replace(str(copy), place))
