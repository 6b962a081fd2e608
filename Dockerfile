# Two images: `cpu`, the default, and `cuda`, which also runs on a GPU.
#
#   docker build --target cpu -t deltanet:cpu .
#   docker build --target cuda -t deltanet:cuda .
#
# Without BuildKit, Docker builds every stage above the target: name `cpu` then, or the CUDA libraries come as well.

FROM debian:bookworm-slim AS tools-cpu
# pip has authorities of its own: let it trust those of the system, to which the base image may have added some.
ENV DELTANET_CACHE=/opt/deltanet PATH=/opt/deltanet/venv/bin:$PATH CCACHE_DISABLE=1 \
    PIP_NO_CACHE_DIR=1 PIP_CERT=/etc/ssl/certs/ca-certificates.crt
WORKDIR /src
COPY deploy/install.sh deploy/requirements-cpu.txt deploy/
RUN deploy/install.sh cpu && apt-get clean && rm -rf /var/lib/apt/lists/*

FROM tools-cpu AS build-cpu
COPY . .
RUN cmake --preset release -DBUILD_TESTING=OFF -DCMAKE_SKIP_RPATH=ON \
    && cmake --build --preset release --target deltanet-server deltanet-client \
    && deploy/docker/collect.sh build/release/bin/deltanet-server build/release/bin/deltanet-client

# What both images say of themselves. They hold no shell and no package manager.
FROM scratch AS run
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="deltanet" \
      org.opencontainers.image.description="gRPC inference service for DeltaNet models" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.licenses="MIT"
USER 65534:65534
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["/usr/bin/deltanet-client", "health", "--server", "127.0.0.1:50051"]
ENTRYPOINT ["/usr/bin/deltanet-server"]

FROM run AS cpu
# The libraries apart from the programs: a new version of the service is a layer of some megabytes.
COPY --from=build-cpu /image/libraries /
COPY --from=build-cpu /image/programs /
# Volumes mounted here begin as these folders: empty, and the user's own.
COPY --from=build-cpu --chown=65534:65534 /image/volumes /
WORKDIR /data

FROM tools-cpu AS tools-cuda
COPY deploy/requirements-cuda.txt deploy/requirements-nvcc.txt deploy/
RUN deploy/install.sh cuda

FROM tools-cuda AS build-cuda
COPY . .
RUN cmake --preset cuda -DBUILD_TESTING=OFF -DCMAKE_SKIP_RPATH=ON \
    && cmake --build --preset cuda --target deltanet-server deltanet-client \
    && deploy/docker/collect.sh build/cuda/bin/deltanet-server build/cuda/bin/deltanet-client

FROM run AS cuda
# What the NVIDIA runtime is to bring in: a GPU, its driver's libcuda, and nvidia-smi for a look at both.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /image/libraries /
COPY --from=build-cuda /image/programs /
COPY --from=build-cuda --chown=65534:65534 /image/volumes /
WORKDIR /data

FROM cpu
