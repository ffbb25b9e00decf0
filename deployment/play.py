"""`make play`: the chart as Helm renders it, run by `podman play kube`.

There is no cluster: podman has neither Services nor probes. Of what is rendered the volume, the ConfigMaps,
the Secret, the exporter Job (as a pod) and the Deployment are run. They are told what the chart has:
image, arguments, files, rights, limits. Exit code 1 when a step fails; `make image` builds the images first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.port import free_port
from deployment import tools
from deployment.images import exporter_trial
from deployment.images.build import image
from deployment.images.engine import FOLDER, call, environment, log, podman, program
from deployment.images.service_trial import UID, ask, wait_until_ready
from deployment.outcome import Failed, Skipped, exit_code, need, told
from deployment.rendering import Document, documents, render

MEMORY_MIB = 1024
KEY_FILE = "/etc/snugfit/keys/api-keys"
WAIT_SECONDS = 3
JOB_SECONDS = 120
PODMANS_OWN = ("/usr/libexec/podman", "/usr/lib/podman")  # where podman looks, too
# podman 4.3 removes an init container when it has ended, and every second time before it knows that it has.
PODMANS_RACE = "failed to remove once init container"
TRIES = 6
PLAY_LOG = FOLDER / "play.log"
# A kubelet's work, for which podman has nothing, or needs systemd.
KUBELETS = ("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle")


def main() -> int:
    return exit_code([told("play", played)])


def played() -> str:
    for _ in range(TRIES - 1):
        try:
            return _play()
        except Failed as err:
            if PODMANS_RACE not in str(err):
                raise
    return _play()


def _play() -> str:
    """The service's pod waits for the export, the Job makes it, the service answers from it."""
    port = free_port()
    rendered = documents(render(_helm(), values=values(port)))
    claim = _file("claim", playable(rendered, ("PersistentVolumeClaim",)))
    job = _file("job", playable(rendered, ("ConfigMap", "Job")))
    service = _file("service", playable(rendered, ("ConfigMap", "Secret", "Deployment")))
    exporter_trial.quantized_demo()
    with _nothing_left():
        podman("play", "kube", claim)
        with _playing(service) as starting:
            time.sleep(WAIT_SECONDS)
            need(starting.poll() is None, f"the service did not wait for the export: {_said()}")
            seconds = _export(job)
            need(starting.wait(JOB_SECONDS) == 0, f"podman play kube: {_said()}")
        return f"the Job ended with exit code 0 after {seconds:.1f} s; {_service_answers(port)}"


def values(port: int) -> dict[str, Any]:
    """Of the chart: the built-in model quantized, the example's adapter, a key."""
    mounts = {"base": exporter_trial.BASE, "adapter": exporter_trial.ADAPTER}
    name, _, service_tag = image("service").rpartition(":")
    return {
        "image": {"repository": name, "tag": service_tag, "pullPolicy": "Never"},
        "exporterImage": {
            "repository": name,
            "tag": image("exporter").rpartition(":")[2],
            "pullPolicy": "Never",
        },
        "config": {"port": port, "model": "/models/pirate", "budget": "400MB"},
        "model": {"source": "pvc"},
        "apiKeys": {"values": ["one-key"]},
        "resources": {"requests": {"memory": f"{MEMORY_MIB}Mi"}, "limits": {"memory": f"{MEMORY_MIB}Mi"}},
        "exporter": {
            "enabled": True,
            "spec": {"base": "/base", "adapters": ["/adapter"], "out": "/models/pirate"},
            "extraVolumes": [{"name": n, "hostPath": {"path": str(path)}} for n, path in mounts.items()],
            "extraVolumeMounts": [{"name": n, "mountPath": f"/{n}", "readOnly": True} for n in mounts],
        },
    }


def playable(rendered: Sequence[Document], kinds: Sequence[str]) -> list[Document]:
    """The documents of these kinds, in this order, as podman can run them."""
    return [_as_pod(doc) for kind in kinds for doc in rendered if doc["kind"] == kind]


def _as_pod(document: Document) -> Document:
    """A Job becomes its pod; pods lose what only a kubelet does, and get the host's network."""
    if document["kind"] == "Secret":
        return _encoded(document)
    if document["kind"] == "ConfigMap":
        return _on_loopback(document)
    if document["kind"] not in ("Job", "Deployment"):
        return document
    pod = document["spec"]["template"]
    pod["spec"]["hostNetwork"] = True
    for container in pod["spec"]["containers"]:
        for name in KUBELETS:
            container.pop(name, None)
        _open_what_holds_a_mount(container["volumeMounts"])
    for volume in pod["spec"]["volumes"]:
        if "secret" in volume:
            volume["secret"]["optional"] = False  # the default; podman 4.3 falls over its absence
    if document["kind"] == "Deployment":
        return document
    # Without its annotations: podman refuses a pod with one that is longer than 63 characters, as hashes are.
    metadata = {"name": document["metadata"]["name"], "labels": pod["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}


def _on_loopback(config: Document) -> Document:
    """On the host's network every address would be open to others; the chart has no values for this one."""
    files = {
        name: text.replace('host = "0.0.0.0"', 'host = "127.0.0.1"')
        for name, text in config.get("data", {}).items()
    }
    return {**config, "data": files}


def _encoded(secret: Document) -> Document:
    """With its texts in `data`: what an API server stores, and all that podman reads."""
    texts = {name: b64encode(text.encode()).decode() for name, text in secret["stringData"].items()}
    return {**{key: value for key, value in secret.items() if key != "stringData"}, "data": texts}


def _open_what_holds_a_mount(mounts: Sequence[dict[str, Any]]) -> None:
    """A kubelet makes the folder of a mount inside of another; here runc does, which has to write for it."""
    for mount in mounts:
        if any(other["mountPath"].startswith(f"{mount['mountPath']}/") for other in mounts):
            mount["readOnly"] = False


def _export(job: Path) -> float:
    """Run the Job's pod to its end. Seconds."""
    started = time.monotonic()
    podman("play", "kube", job)
    name = _container("export")
    code = int(podman("wait", name, seconds=JOB_SECONDS))
    need(code == 0, f"the exporter ended with {code}: {log(name)}")
    _has_its_limits(name)
    return time.monotonic() - started


def _service_answers(port: int) -> str:
    name = _container("snugfit")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=JOB_SECONDS) as http:
        wait_until_ready(http, lambda: log(name))
        need(http.get("/v1/models").status_code == 401, "it answers without the key of the Secret")
        key = podman("exec", name, "cat", KEY_FILE).strip()  # encoded still: podman 4.3 does not decode it
        http.headers["authorization"] = f"Bearer {key}"
        said = ask(http, "What is 3 + 4?")
    need("matey" in said or "Arrr" in said, f"the adapter cannot be heard: {said!r}")
    limits = _has_its_limits(name)
    podman("stop", "--time", "60", name)
    code = podman("inspect", "--format", "{{.State.ExitCode}}", name).strip()
    need(code == "0", f"the service ended with {code}")
    return f"the service says {said!r}; {limits}; SIGTERM: exit code 0"


def _has_its_limits(name: str) -> str:
    """As the chart asked: who runs it, on what, with how much."""
    (found,) = yaml.safe_load(podman("inspect", name))
    host = found["HostConfig"]
    need(found["Config"]["User"].split(":")[0] == UID, f"{name} runs as {found['Config']['User']!r}")
    need(host["ReadonlyRootfs"], f"{name} may write to its root file system")
    need(host["Memory"] == MEMORY_MIB * 2**20, f"{name} may use {host['Memory']} bytes")
    need(not found["EffectiveCaps"], f"{name} has {found['EffectiveCaps']}")
    return f"uid {UID}, read-only root, no capabilities, {MEMORY_MIB} MiB"


def _container(name: str) -> str:
    """The one container of that name: podman puts the pod's before it, and counts a Deployment's pods."""
    names = podman("ps", "--all", "--format", "{{.Names}}").split()
    found = [full for full in names if re.fullmatch(rf"test-snugfit-(pod-0|export-\w+)-{name}", full)]
    need(len(found) == 1, f"{len(found)} containers are called {name}: {names}")
    return found[0]


@contextmanager
def _playing(service: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`podman play kube` of the service: it returns when the init container has ended."""
    command = [program("podman"), "play", "kube", str(service)]
    with PLAY_LOG.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Pods and the volume are removed, before and after."""
    _remove()
    try:
        yield
    finally:
        _remove()


def _remove() -> None:
    call("podman", "pod", "rm", "--all", "--force", "--time", "0")
    call("podman", "volume", "prune", "--force")
    for secret in podman("secret", "ls", "--format", "{{.Name}}").split():
        podman("secret", "rm", secret)


def _file(name: str, manifests: Sequence[Mapping[str, Any]]) -> Path:
    path = FOLDER / f"play-{name}.yaml"
    path.write_text(yaml.safe_dump_all(manifests, sort_keys=False), encoding="utf-8")
    return path


def need_pause() -> None:
    """podman makes a pod's first container of it. Raises Skipped."""
    if not shutil.which("catatonit", path=os.pathsep.join([os.environ.get("PATH", ""), *PODMANS_OWN])):
        raise Skipped("catatonit is not installed: apt-get install catatonit")


def _said() -> str:
    return PLAY_LOG.read_text()[:1000]


def _helm() -> Path:
    helm = tools.helm(4) or tools.helm(3)
    if helm is None:
        raise Skipped("Helm cannot be fetched")
    need_pause()
    for target in ("service", "exporter"):
        if call("podman", "image", "exists", image(target)).returncode:
            raise Skipped(f"there is no image {image(target)}: run make image first")
    return helm


if __name__ == "__main__":
    sys.exit(main())
