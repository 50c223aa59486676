# syntax=docker/dockerfile:1
# Three stages: build the environment with llama.cpp's tools in it, add the project, keep only what runs.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false

# Tools: everything that the lock pins. The kernels that compute are built for any x86-64, not for the building machine.
FROM base AS tools
# The packages are pinned by the distribution's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "uv>=0.9,<1"
ENV UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_COMPILE_BYTECODE=1 CMAKE_ARGS="-DGGML_NATIVE=OFF"
WORKDIR /app
COPY pyproject.toml uv.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --locked --no-dev --no-install-project

FROM tools AS project
COPY LICENSE README.md ./
COPY calibration calibration
COPY flows flows
COPY quant quant
COPY recipes recipes
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --locked --no-dev --no-editable

FROM base AS final
# The packages are pinned by the distribution's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 foundry \
    && install -d -o foundry /work
COPY --from=project /app/.venv /app/.venv
COPY --chown=foundry prefect.yaml pyproject.toml /app/
COPY --chown=foundry flows /app/flows
ENV PATH=/app/.venv/bin:$PATH QUANT_WORK=/work/.work
USER 1000
WORKDIR /app
VOLUME /work
ENTRYPOINT ["quant"]
CMD ["--help"]
