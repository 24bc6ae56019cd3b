# A worker. With the default arguments PyTorch comes with CUDA; the host needs NVIDIA's driver and
# container toolkit. For a smaller image without CUDA set TORCH_INDEX_URL and an empty APT_PACKAGES, as
# docker/compose.cpu.yml does.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_NO_INDEX=
ARG PIP_INDEX_URL=
ARG TORCH_INDEX_URL=
ENV PIP_CONSTRAINT=/build/constraints.txt PIP_FIND_LINKS=/build/docker/wheels
WORKDIR /build
COPY docker/ docker/
COPY constraints.txt pyproject.toml ./
# Dependencies first, so that a change of the sources does not download them again.
RUN docker/install.sh dependencies worker
COPY . .
RUN docker/install.sh package
# Compile what a worker and its health check import. Containers cannot store bytecode; without it
# their start takes 12 seconds instead of 5.
RUN PYTHONPYCACHEPREFIX=/opt/losslab/bytecode /opt/losslab/bin/python -P -c \
    "import alembic.command, psycopg, server.cli.main, worker.main"

FROM ${BASE_IMAGE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Losslab worker" \
      org.opencontainers.image.description="Trains the jobs that the server takes" \
      org.opencontainers.image.revision="${REVISION}"
# On a GPU, PyTorch's compiler needs one of C. Without it a worker trains more slowly.
ARG APT_PACKAGES="gcc libc6-dev"
RUN [ -z "$APT_PACKAGES" ] \
    || { apt-get update && apt-get install -y --no-install-recommends $APT_PACKAGES \
         && rm -rf /var/lib/apt/lists/*; }
RUN groupadd --gid 10001 losslab \
    && useradd --uid 10001 --gid losslab --no-create-home --shell /usr/sbin/nologin losslab \
    && install -d -o losslab -g losslab /data
ENV PATH=/opt/losslab/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPYCACHEPREFIX=/opt/losslab/bytecode \
    MPLCONFIGDIR=/tmp/matplotlib \
    LOSSLAB_DATA_DIR=/data
USER 10001:10001
HEALTHCHECK --interval=60s --timeout=20s --start-period=60s --retries=3 \
    CMD ["losslab", "worker", "--check"]
# The worker hands its job back within the engine's stop timeout.
STOPSIGNAL SIGTERM
CMD ["losslab", "worker"]
# Last, so that no later layer contains it a second time.
COPY --from=build /opt/losslab /opt/losslab
