# The service (docs/serve.md). CPU:
#   docker build -t hyperdreambooth .
# CUDA (needs the NVIDIA container toolkit on the host):
#   docker build -t hyperdreambooth:cuda --build-arg TORCH=https://download.pytorch.org/whl/cu130 .
FROM python:3.11-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HOME=/data HDB_CACHE=/data/cache
WORKDIR /app

# torch first: the layer stays when only the source changes
RUN pip install torch --index-url "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install ".[serve,postgres,c2pa]" && useradd --uid 10001 --home-dir /data hdb \
    && mkdir /data && chown hdb /data

USER hdb
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
# listens for others, so it starts only once there is a key:
#   docker run --rm -v people:/data hyperdreambooth keys add NAME
ENTRYPOINT ["hdb", "serve", "--data", "/data/serve", "--host", "0.0.0.0"]
