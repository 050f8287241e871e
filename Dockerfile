# CPU:  docker build -t ssl_samix .
# CUDA: docker build -t ssl_samix --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#           --build-arg INDEX=https://pypi.org/simple .
# Run:  docker run --rm -v "$PWD:/work" ssl_samix pretrain data=folder data.root=photos
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/env
ENV PATH=/opt/env/bin:$PATH
RUN pip install --no-cache-dir torch torchvision --index-url ${INDEX}
COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src
WORKDIR /work
ENTRYPOINT ["samix"]
