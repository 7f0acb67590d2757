# The agent and the CA in one image: `sds-agent run FILE` and `sds-agent ca serve FILE`.
#
#   docker build -t sds-agent .
#   docker run --read-only -v "$PWD/sds-agent.yaml:/etc/sds-agent/sds-agent.yaml:ro" \
#              -v agent-run:/run/sds-agent -v agent-state:/var/lib/sds-agent sds-agent
#   docker run --read-only -v "$PWD/ca.yaml:/etc/sds-agent/ca.yaml:ro" -v ca-state:/var/lib/sds-agent \
#              sds-agent ca serve /etc/sds-agent/ca.yaml
#
# It builds with the classic builder and with BuildKit. Envoy reaches the socket in /run/sds-agent, a volume that both share.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python3 -m venv /opt/sds-agent
# The dependencies have a layer of their own, which a change of the sources does not rebuild.
COPY pyproject.toml ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > dependencies.txt \
 && /opt/sds-agent/bin/pip install --no-cache-dir --quiet -r dependencies.txt
COPY README.md LICENSE ./
COPY proto_gen proto_gen
COPY src src
RUN /opt/sds-agent/bin/pip install --no-cache-dir --quiet --no-deps . \
 && /opt/sds-agent/bin/pip uninstall --quiet --yes pip setuptools
# In a clone that was made with a umask of 077 only the owner can read the files; the image's user has to read these.
COPY scripts/container_health.py envoy/agent.yaml ./
RUN chmod 0644 container_health.py agent.yaml

FROM python:3.11-slim-bookworm
# The ids are fixed so that a volume has the same owner after the next build. The socket gets the group of its directory,
# and 101 is the group of the public Envoy image, which can connect with `user: "101:101"`.
RUN groupadd --gid 10001 sds-agent \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin sds-agent \
 && install -d -o 10001 -g 101 -m 2750 /run/sds-agent \
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/sds-agent
COPY --from=build /opt/sds-agent /opt/sds-agent
COPY --from=build /src/container_health.py /opt/sds-agent/
# The example that fits the Envoy files in envoy/; mount your own in its place.
COPY --from=build /src/agent.yaml /etc/sds-agent/sds-agent.yaml
# The agent's places, in systemd's variables, for a file that names none.
ENV PATH=/opt/sds-agent/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    RUNTIME_DIRECTORY=/run/sds-agent \
    STATE_DIRECTORY=/var/lib/sds-agent
USER 10001:10001
VOLUME ["/run/sds-agent", "/var/lib/sds-agent"]
# The agent: each workload has a certificate. The CA: it answers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python3", "/opt/sds-agent/container_health.py"]
ENTRYPOINT ["sds-agent"]
CMD ["run", "/etc/sds-agent/sds-agent.yaml"]
