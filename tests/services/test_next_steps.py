"""What a newcomer reads on the terminal once the agent serves: it is pasted, so it has to be right."""

from pathlib import Path

import yaml
from fakes.configurations import MINIMAL, UID, settings

from sds_agent.cli.next_steps import stanza, steps
from sds_agent.config.loading import load
from sds_agent.envoy_config import messages
from sds_agent.envoy_config.choices import EnvoyChoices


def test_the_stanza_is_what_envoy_config_builds(tmp_path: Path) -> None:
    chosen = settings(tmp_path, MINIMAL.replace("name: default", "name: 'a \"b'"))
    choices = EnvoyChoices(
        name=chosen.workloads[0].name,
        spiffe_id=chosen.workloads[0].spiffe_id,
        trust_domain=chosen.trust_domain,
        bundle="ROOTCA",
        socket=chosen.sds.socket,
    )
    cluster, listener = yaml.safe_load_all(stanza(chosen))
    assert cluster == messages.as_json(messages.sds_cluster(choices))
    assert listener == messages.as_json(messages.downstream(choices))


def test_without_a_file_there_is_an_envoy_configuration_to_paste() -> None:
    chosen = load(None, {}, uid=UID).settings
    text = "\n".join(steps(chosen, None))
    assert "tls_certificate_sds_secret_configs" in text
    assert "sds-agent status" in text
    assert "set admin.address" in text


def test_with_a_file_the_commands_name_it(tmp_path: Path) -> None:
    chosen = settings(tmp_path, MINIMAL + "admin: {address: 127.0.0.1:9902}\n")
    text = "\n".join(steps(chosen, Path("/etc/a.yaml")))
    assert "sds-agent envoy-config default --config /etc/a.yaml" in text
    assert "http://127.0.0.1:9902/" in text
    assert "tls_certificate_sds_secret_configs" not in text
