# Two images:  docker build --target run -t edgepack .      docker run -v "$PWD:/home/edgepack" edgepack run
#              docker build --target test -t edgepack-test . && docker run edgepack-test
# PyTorch's default build carries CUDA; for a slim image name the index of CPU builds with
#   --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.11-slim-bookworm AS run
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
COPY . .
# hadolint ignore=DL3013
RUN pip install torch==2.13.0 && pip install '.[all]' \
    && useradd --uid 1000 --create-home edgepack
USER 1000
WORKDIR /home/edgepack
ENTRYPOINT ["edgepack"]

FROM run AS test
USER 0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/* \
    && chown --recursive 1000 /src
USER 1000
WORKDIR /src
RUN make setup
ENTRYPOINT ["make"]
CMD ["test"]
