# syntax=docker/dockerfile:1
#   docker build --target cpu --tag bilevel:cpu .
#   docker build --target cuda --tag bilevel:cuda .
# EXTRAS are those of pyproject.toml. DeepSpeed is not among them by default: it needs a base (PYTHON_IMAGE) with a compiler and nvcc.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# A stage of its own: where pyproject.toml changes and this list does not, what is installed below stays cached.
FROM ${PYTHON_IMAGE} AS requirements
ARG EXTRAS=llm,quantized,near-duplicates
WORKDIR /requirements
COPY pyproject.toml constraints.txt ./
RUN python -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = [project['optional-dependencies'][extra] for extra in sys.argv[1].split(',')]; \
    print(*project['dependencies'], *sum(extras, []), sep='\n')" "${EXTRAS}" > requirements.txt

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip pip install --disable-pip-version-check -c constraints.txt build hatchling
COPY pyproject.toml README.md LICENSE ./
COPY bilevel/ bilevel/
COPY problems/ problems/
COPY backends/ backends/
COPY theory_checks/ theory_checks/
RUN python -m build --wheel --no-isolation --outdir /dist

FROM ${PYTHON_IMAGE} AS base
# The home may be written to by anyone, as `docker run --user "$(id -u)"` makes the files of a run belong to whoever starts it.
RUN useradd --uid 10001 --create-home bilevel && chmod 1777 /home/bilevel && install --directory --owner bilevel /work \
    && python -m venv /opt/bilevel
ENV PATH=/opt/bilevel/bin:$PATH HOME=/home/bilevel USER=bilevel PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["bilevel"]
CMD ["--help"]
COPY --from=requirements /requirements/ /requirements/

# Torch of the index has a local version (2.13.0+cpu), which pip prefers to the same version of PyPI.
FROM base AS cpu
RUN --mount=type=cache,target=/root/.cache/pip pip install --disable-pip-version-check \
    --extra-index-url https://download.pytorch.org/whl/cpu -c /requirements/constraints.txt -r /requirements/requirements.txt
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
USER 10001

# Torch's wheels bring the libraries of CUDA, so a base that has them would hold them twice; the driver is the host's
# (NVIDIA Container Toolkit), which reads the two variables.
FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=cache,target=/root/.cache/pip pip install --disable-pip-version-check \
    --extra-index-url https://download.pytorch.org/whl/cu130 -c /requirements/constraints.txt -r /requirements/requirements.txt
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps /dist/*.whl
USER 10001
