"""`make image`: the Dockerfile, compose.yaml and both images, built and run as a platform would.

Prints a line for each step; exit code 1 when one fails. What a tool is missing for is skipped, and a line
says so. The base is an image of Debian that is made here from packages, unless `--base` names another.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

from deployment import ROOT, tools
from deployment.images import build, compose, exporter_trial, service_trial
from deployment.images.build import image
from deployment.images.engine import program
from deployment.outcome import Failed, Skipped, exit_code, need, told

MB = 10**6
TARGETS = ("service", "exporter")
# No index has it: pip must neither take the "+cpu" wheel nor the release without a label, which is CUDA's.
NO_SUCH_TORCH = "TORCH=2.13.0+elsewhere"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deployment.image", description=__doc__)
    parser.add_argument("--base", metavar="IMAGE", help="An image with Python 3.11 and its venv module.")
    return exit_code(_steps(parser.parse_args().base))


def _steps(base: str | None) -> Iterator[str]:
    yield told("hadolint", _hadolint)
    yield told("docker compose config", compose.config)
    built = told("build", lambda: _build(base))
    yield built
    if built.startswith("ok"):
        yield from _trials(base or build.LOCAL_BASE)
    else:
        yield "SKIPPED  everything that takes the images: they could not be built"


def _trials(base: str) -> Iterator[str]:
    yield told("layers", _layers)
    yield told("rebuild after a change", lambda: _rebuild(base))
    yield told("torch that is nowhere", lambda: _refused(base))
    yield told("service answers", service_trial.answers)
    yield told("service drains", service_trial.drains)
    yield told("service stops while starting", service_trial.stops_while_starting)
    with exporter_trial.volume() as models:
        yield told("exporter finishes a job", lambda: exporter_trial.exports(models))
        yield told("exporter refuses a bad job", lambda: exporter_trial.refuses(models))
        yield told("service serves the export", lambda: exporter_trial.is_served(models))


def _hadolint() -> str:
    found = tools.hadolint()
    if found is None:
        raise Skipped("hadolint cannot be fetched: see above")
    run = subprocess.run([found, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    need(run.returncode == 0, run.stdout + run.stderr)
    return "no warning"


def _build(base: str | None) -> str:
    program("buildah"), program("podman")
    base = base or build.local_base()
    build.snapshot()
    seconds = {target: build.build(target, base) for target in TARGETS}
    sizes = [f"{target} {_megabytes(image(target))} in {took:.0f} s" for target, took in seconds.items()]
    return f"{', '.join(sizes)} (cached layers are used), on {base} {_megabytes(base)}"


def _megabytes(name: str) -> str:
    return f"{build.size_bytes(name) / MB:,.0f} MB"


def _layers() -> str:
    service, exporter = (build.layer_ids(image(target)) for target in TARGETS)
    need(exporter == service[: len(exporter)], "the exporter does not share the service's layers")
    rows = [layer for layer in build.layers(image("service")) if layer.n_bytes >= MB]
    listed = "".join(f"\n         {row.n_bytes / MB:7.1f} MB  {row.made_by[:80]}" for row in rows)
    return f"the exporter has the service's and no other{listed}"


def _rebuild(base: str) -> str:
    """Only what holds our own code may be made again."""
    build.change()
    changed = "localhost/snugfit:changed"
    seconds = build.build("service", base, name=changed)
    before, after = build.layer_ids(image("service")), build.layer_ids(changed)
    kept = sum(old == new for old, new in zip(before, after, strict=True))
    need(len(before) - kept <= 3, f"{len(before) - kept} of {len(before)} layers were made again")
    return f"{seconds:.1f} s, {kept} of {len(before)} layers kept"


def _refused(base: str) -> str:
    try:
        build.build("service", base, arguments=(NO_SUCH_TORCH,), name="localhost/snugfit:never")
    except Failed as err:
        need("No torch 2.13.0+elsewhere" in str(err), f"refused, but not because of torch: {err}")
        return "the build fails, although pip could have had another build of 2.13.0"
    raise Failed("the build took another torch than the one it was told")


if __name__ == "__main__":
    sys.exit(main())
