# The server on CPU, as user 10001, with nothing to write but /var/lib/promptmux and /tmp.
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=URL -t promptmux .
#
# On Linux a registry's default torch brings CUDA along, gigabytes that this image has no use for. With URL = the index
# of PyTorch's CPU builds, pip takes the CPU build of the same pinned release.
FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/promptmux/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/promptmux
COPY constraints.txt ./
RUN pip install -c constraints.txt pip torch
COPY pyproject.toml README.md LICENSE ./
COPY clients/python clients/python
COPY kernels kernels
COPY prompts prompts
COPY server server
RUN pip install -c constraints.txt --build-constraint constraints.txt ./clients/python .
# The compiled CPU ops, for every instruction set: the image that runs has no compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && python -m promptmux_kernels.native --ship

FROM python:3.11-slim
RUN groupadd --gid 10001 promptmux \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin promptmux \
    && install --directory --owner=10001 --group=10001 /var/lib/promptmux
COPY --from=build /opt/promptmux /opt/promptmux
ENV PATH=/opt/promptmux/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    PROMPTMUX_STATE=/var/lib/promptmux \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1
USER 10001:10001
WORKDIR /var/lib/promptmux
VOLUME /var/lib/promptmux
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["promptmux"]
# Beyond loopback the server refuses to start without PROMPTMUX_API_KEYS, a file of key digests.
CMD ["serve", "--host", "0.0.0.0"]
