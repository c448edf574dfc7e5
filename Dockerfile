# The quickstart in a container; docs/start.md has the commands.
#     docker build -t buddygpt .
#     docker run --rm -it -v "$PWD/outputs:/buddygpt/outputs" buddygpt
# For NVIDIA GPUs: --build-arg TORCH_INDEX=https://pypi.org/simple, whose torch has CUDA, and `docker run --gpus all`.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX=https://pypi.org/simple

# g++ compiles for torch.compile and DeepSpeed; the font is for Chinese labels in plots.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends fonts-wqy-microhei g++ make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /buddygpt
ENV PIP_INDEX_URL=${PIP_INDEX} PIP_NO_CACHE_DIR=1

# Packages change less often than the code: in layers of their own they are installed once.
COPY requirements.txt .
RUN python3 -m venv .venv \
 && .venv/bin/pip install --index-url "${TORCH_INDEX}" "$(grep '^torch==' requirements.txt)" \
 && sed '/^-e /d' requirements.txt > /tmp/packages.txt \
 && .venv/bin/pip install --requirement /tmp/packages.txt

COPY . .
RUN make setup

CMD ["make", "quickstart"]
