# The controller's image: `docker build -t sisu-kodo:dev .` (make kind-up does it).
#
# Two stages from one base: the first resolves nothing, it installs exactly the locked and hashed requirements; the last
# holds Python, git (for workspaces), OpenCode's daemon and the product, and runs as a number, not as root. At run time no shell
# is called. A stage between fetches the daemon, for x86-64 only, by npm from the registry that npm is configured for.
# Where no registry can be reached, as on the machine this was developed on, a stand-in for BASE serves: a Debian root
# with CPython 3.12 in /usr/local, imported under BASE's name, then `buildah bud --isolation chroot --pull-never`.

# Pin both by digest for a release: --build-arg BASE=python:3.12-slim@sha256:…
ARG BASE=python:3.12-slim
ARG NODE=node:22-slim

FROM ${BASE} AS dependencies
COPY requirements/runtime.lock /tmp/runtime.lock
RUN python -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps --only-binary :all: -r /tmp/runtime.lock \
 && /opt/venv/bin/python -m pip check \
 && /opt/venv/bin/python -m pip uninstall --yes --quiet pip
# What importlib.metadata answers for our own name: the product runs from its source, without being built into a wheel.
ARG VERSION=0.1.0
RUN site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
 && mkdir "$site/sisu_kodo-$VERSION.dist-info" \
 && printf 'Metadata-Version: 2.1\nName: sisu-kodo\nVersion: %s\n' "$VERSION" > "$site/sisu_kodo-$VERSION.dist-info/METADATA"

FROM ${NODE} AS opencode
COPY opencode/opencode.version /tmp/opencode.version
# Of bin/opencode in the package: the same as in opencode/install.py.
ARG OPENCODE_SHA256=0abbb7c32ab0294c0a7bfa2705f9ff0df5dce5ab721d1f00cccfe393f2a11427
RUN npm install --prefix /tmp/opencode --no-save --no-audit --no-fund --ignore-scripts "opencode-linux-x64@$(cat /tmp/opencode.version)" \
 && mkdir -p /opt/opencode \
 && install -m 0555 /tmp/opencode/node_modules/opencode-linux-x64/bin/opencode /opt/opencode/opencode \
 && echo "$OPENCODE_SHA256  /opt/opencode/opencode" | sha256sum -c -

FROM ${BASE}
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends git ca-certificates \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY --from=dependencies /opt/venv /opt/venv
WORKDIR /app
COPY migrations/ migrations/
COPY crds/ crds/
# Recorded turns of the demo's goals: OC_MODE=replay works without a model and without a daemon.
COPY opencode/fixtures/ opencode/fixtures/
# OpenCode's daemon, for OC_MODE=live and record, with its configuration and pinned version.
COPY --from=opencode /opt/opencode /opt/opencode
COPY opencode/opencode.json opencode/opencode.version opencode/
COPY controller/ controller/
# The root file system is read-only at run time, so bytecode is written now. /var/lib/sisu-kodo is a volume in the chart.
RUN /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash controller \
 && mkdir -p /var/lib/sisu-kodo && chown 65532:65532 /var/lib/sisu-kodo
# USER: kopf asks for the name of the user, and a number that a cluster chose has none in /etc/passwd.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    LANG=C.UTF-8 \
    OC_BINARY=/opt/opencode/opencode \
    OC_CONFIG=/app/opencode/opencode.json \
    OC_FIXTURES=/app/opencode/fixtures \
    USER=sisu-kodo \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1
# A number, so that a kubelet can tell that it is not root.
USER 65532:65532
EXPOSE 3002
STOPSIGNAL SIGTERM
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sisu-kodo" \
      org.opencontainers.image.description="Runs software goals as durable, human-approved, sandboxed work on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["python", "-m", "controller"]
CMD ["run"]
