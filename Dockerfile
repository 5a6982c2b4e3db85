# prime-trainer in a container, as a user without rights. From the root of the repository:
#
#   docker build -t prime-trainer .                                                 # CPUs
#   docker build -t prime-trainer --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 \
#     --build-arg CUDA=ON --build-arg EXTRAS=train,triton,vllm .                    # GPUs
#
# docs/docker.md has the flags that the sandbox of programs and answers needs.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# The extension's CUDA kernels: ON needs a base with nvcc.
ARG CUDA=OFF
ARG EXTRAS=train
# What torch is installed as. For CPUs alone, take it from an index of such builds: --build-arg PIP_INDEX_URL=...
ARG TORCH=
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Versions are those of the base's release.
# hadolint ignore=DL3008
RUN apt-get update; \
    apt-get install -y --no-install-recommends bubblewrap g++ libseccomp2 python3 python3-dev python3-venv; \
    rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 prime; \
    python3 -m venv /opt/prime
ENV PATH=/opt/prime/bin:${PATH}

WORKDIR /src
COPY constraints.txt CMakeLists.txt LICENSE README.md pyproject.toml setup.py ./
COPY csrc csrc
COPY prime_kernels prime_kernels
COPY python python

# An empty argument is no index. torch comes first: no other package may choose its version.
RUN if [ -z "$PIP_INDEX_URL" ]; then unset PIP_INDEX_URL; fi; \
    if [ -z "$PIP_EXTRA_INDEX_URL" ]; then unset PIP_EXTRA_INDEX_URL; fi; \
    export PIP_NO_CACHE_DIR=1 PRIME_KERNELS_CPU=ON PRIME_KERNELS_CUDA="$CUDA"; \
    /opt/prime/bin/pip install "${TORCH:-$(grep '^torch==' constraints.txt)}"; \
    /opt/prime/bin/pip install -c constraints.txt ".[$EXTRAS]"; \
    rm -rf build ./*.egg-info python/*.egg-info

USER 10001
WORKDIR /home/prime
ENTRYPOINT ["prime-trainer"]
CMD ["--help"]
