# The server in a container: non-root, with the CPU kernels for machines like the one that builds it, and the
# compiler that builds them for others (on first use, in seconds, kept in the cache volume).
#
#   docker build --tag memory-efficient-gpt .
#       torch comes from pip's default index: on x86 that build runs on CUDA devices and on CPUs.
#   docker build --build-arg TORCH_INDEX_URL=... .
#       another index for torch. PyTorch's CPU-only one makes the image several GB smaller.
#   docker build --build-arg EXTRAS=cuda,quant .
#       optional parts of the package, for machines with CUDA devices.
ARG PYTHON_VERSION=3.11
ARG BASE_IMAGE=python:${PYTHON_VERSION}-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX_URL=""
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /app/venv
ENV PATH=/app/venv/bin:$PATH
WORKDIR /app/source

# Layers from the slowest-changing to the fastest: torch, what the package needs, the package.
# The secret is optional: a pip.conf that names a mirror (docker build --secret id=pip.conf,src=...).
COPY constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    grep '^torch==' constraints.txt > torch.txt \
    && pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --requirement torch.txt
COPY pyproject.toml docker/requirements.py ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python requirements.py "$EXTRAS" > requirements.txt \
    && echo hatchling >> requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE CHANGELOG.md ./
COPY engine engine
COPY server server
RUN pip install --no-deps --no-build-isolation . \
    && pip uninstall --yes hatchling

FROM ${BASE_IMAGE} AS run
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /home/megpt megpt \
    && install --directory --owner megpt --group megpt /home/megpt/.cache
COPY --from=build /app/venv /app/venv
COPY docker/healthcheck.py /app/healthcheck.py
ENV PATH=/app/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    MEGPT_CACHE_DIR=/home/megpt/.cache/memory_efficient_gpt \
    MEGPT_HOST=0.0.0.0
USER 10001
WORKDIR /home/megpt
# The CPU kernels for CPUs like this one; a new cache volume begins with them. On another CPU they are built anew.
RUN megpt kernels build
# Compiled kernels, and models downloaded by id.
VOLUME /home/megpt/.cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "/app/healthcheck.py"]
ENTRYPOINT ["megpt"]
CMD ["serve"]
