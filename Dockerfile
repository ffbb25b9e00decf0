# Two images from one file that share every layer: `--target service` and `--target exporter`.
# docs/docker.md says what to pass for the CPU and for CUDA, and how large they get.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# `--build-context wheels=DIR` puts a folder of wheels in its place: for torch where no index is reached. The file is
# there so that it can be mounted: not every builder mounts a stage of nothing.
FROM scratch AS wheels
COPY LICENSE /

# The dependencies alone: installing them is done again for a change of theirs, not for any of pyproject.toml.
FROM ${BASE_IMAGE} AS requirements
ARG EXTRAS=otel
COPY pyproject.toml /
RUN python3 -c "import tomllib; \
project = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
extras = [line for name in '$EXTRAS'.split() for line in project['optional-dependencies'][name]]; \
print(*project['dependencies'], *extras, sep='\n')" > /requirements.txt

# The wheel, unpacked under /install as it will lie in /opt/snugfit. The compiler stays here.
FROM ${BASE_IMAGE} AS wheel
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/snugfit/bin:$PATH
WORKDIR /source
COPY constraints.txt pyproject.toml ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=bind,from=wheels,target=/wheels \
    python3 -m venv /opt/snugfit \
    && pip install --no-cache-dir --find-links /wheels --constraint constraints.txt "setuptools>=77"
# The kernels first: they take the most time and change the least. setuptools needs the files that metadata names.
COPY service/engine/cpu/*.cpp service/engine/cpu/*.h service/engine/cpu/
RUN touch README.md LICENSE \
    && python -c "import setuptools; setuptools.setup()" --quiet build_ext
COPY README.md LICENSE ./
COPY loader loader/
COPY exporter exporter/
COPY service service/
# A compiler error leaves no kernels and does not stop setuptools: it stops here.
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && grep --quiet "service/engine/cpu/_kernels.*\.so" /dist/snugfit-*.whl \
    && pip install --no-cache-dir --no-deps --no-index --prefix /install /dist/snugfit-*.whl

FROM ${BASE_IMAGE} AS runtime
LABEL org.opencontainers.image.title="snugfit" \
      org.opencontainers.image.description="Fits a language model into the memory you have and serves it over the OpenAI API" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 snugfit \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin snugfit \
    && install --directory --owner 10001 --group 10001 /models
COPY --from=wheel /usr/bin/tini-static /usr/bin/tini
ENV PATH=/opt/snugfit/bin:$PATH
WORKDIR /opt/snugfit
RUN python3 -m venv .
COPY constraints.txt ./
# "+cpu" is at no index but torch's own: a build that cannot reach it fails, where "2.13.0" would bring CUDA. ===
# compares the text: for == a 2.13.0+cpu among the wheels would be a 2.13.0 too.
ARG TORCH=2.13.0+cpu
ARG TORCH_INDEX
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=bind,from=wheels,target=/wheels \
    pip install --no-cache-dir --find-links /wheels ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint constraints.txt "torch===$TORCH" \
    || { echo "No torch $TORCH: pass --build-arg TORCH_INDEX=… or --build-context wheels=… (docs/docker.md)" >&2; exit 1; } \
    && rm -rf lib/python3*/site-packages/torch/include lib/python3*/site-packages/torch/test \
        lib/python3*/site-packages/torch/bin/*[Tt]est*
COPY --from=requirements /requirements.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=bind,from=wheels,target=/wheels \
    pip install --no-cache-dir --find-links /wheels --constraint constraints.txt --requirement requirements.txt \
        "torch===$TORCH"
COPY --from=wheel /install /opt/snugfit
# PYTHONSAFEPATH: a folder in /models is not a package.
ENV HOME=/tmp \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
WORKDIR /models
USER 10001:10001

FROM runtime AS exporter
ENTRYPOINT ["tini", "--", "python", "-m", "exporter"]
CMD ["--help"]

FROM runtime AS service
# Without NVIDIA_VISIBLE_DEVICES: whoever runs the container says which cards it may see.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SNUGFIT_HOST=0.0.0.0
EXPOSE 8000
# Ready, not only alive: what waits for "healthy" wants answers. Loading may take an hour before it counts as a failure.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=1h CMD ["python", "-c", "\
import http.client, os, sys; \
http = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('SNUGFIT_PORT') or 8000), timeout=4); \
http.request('GET', '/ready'); \
sys.exit(http.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "snugfit"]
CMD ["serve"]
