# The HTTP server: no torch, no compiler, no root.
# Both stages need the same Python, so that the environment can be moved from one to the other.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_NO_INDEX=
ARG PIP_INDEX_URL=
ENV PIP_CONSTRAINT=/build/constraints.txt PIP_FIND_LINKS=/build/docker/wheels
WORKDIR /build
COPY docker/ docker/
COPY constraints.txt pyproject.toml ./
# Dependencies first, so that a change of the sources does not download them again.
RUN docker/install.sh dependencies
COPY . .
RUN docker/install.sh package \
    && find /opt/losslab -name tests -type d -prune -exec rm -r {} + \
    && find /opt/losslab -type f -regex '.*[.]\(pyi\|pyx\|pxd\|a\|h\|c\|cpp\)' -delete

FROM ${BASE_IMAGE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Losslab server" \
      org.opencontainers.image.description="Takes training jobs over HTTP and judges them" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 losslab \
    && useradd --uid 10001 --gid losslab --no-create-home --shell /usr/sbin/nologin losslab \
    && install -d -o losslab -g losslab /data
ENV PATH=/opt/losslab/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    LOSSLAB_DATA_DIR=/data \
    LOSSLAB_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["losslab", "serve"]
# Last, so that no later layer contains it a second time.
COPY --from=build /opt/losslab /opt/losslab
