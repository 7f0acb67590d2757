"""The unit files: a directive that is missing leaves the agent with more rights, or without its socket, on every
machine.
"""

from pathlib import Path

import pytest

from sds_agent.units import UnitPlan, files

PLAN = UnitPlan(
    command="/usr/bin/sds-agent",
    file=Path("/etc/sds-agent/sds-agent.yaml"),
    socket=Path("/run/sds-agent/sds.sock"),
    mode="0660",
    group="envoy",
)


def changed(**fields: object) -> UnitPlan:
    return UnitPlan(**{**{name: getattr(PLAN, name) for name in PLAN.__struct_fields__}, **fields})


def service(plan: UnitPlan, *, with_socket: bool = False) -> list[str]:
    (text,) = (each.text for each in files(plan, with_socket=with_socket) if each.path.suffix == ".service")
    return text.splitlines()


def test_the_files_have_the_places_where_systemd_reads_them() -> None:
    assert [str(each.path) for each in files(PLAN, with_socket=True)] == [
        "/etc/sysusers.d/sds-agent.conf",
        "/etc/systemd/system/sds-agent.service",
        "/etc/systemd/system/sds-agent.socket",
    ]
    assert len(files(PLAN, with_socket=False)) == 2


def test_the_service_tells_systemd_how_it_does_and_is_restarted_whatever_ends_it() -> None:
    lines = service(PLAN)
    assert {"Type=notify", "Restart=always", "StartLimitIntervalSec=0"} <= set(lines)
    assert any(line.startswith("WatchdogSec=") for line in lines)
    assert "ExecStart=/usr/bin/sds-agent run /etc/sds-agent/sds-agent.yaml" in lines
    assert "ExecReload=kill -HUP $MAINPID" in lines


def test_the_agent_runs_without_rights_and_sees_the_users_of_its_envoys() -> None:
    lines = service(PLAN)
    assert {"User=sds-agent", "CapabilityBoundingSet=", "NoNewPrivileges=yes", "ProtectSystem=strict"} <= set(lines)
    assert not any(line.startswith("PrivateUsers=") for line in lines)


def test_the_socket_has_the_mode_and_the_group_of_the_configuration() -> None:
    (text,) = (each.text for each in files(PLAN, with_socket=True) if each.path.suffix == ".socket")
    assert {"ListenStream=/run/sds-agent/sds.sock", "SocketMode=0660", "SocketGroup=envoy"} <= set(text.splitlines())


def test_the_service_waits_for_its_socket_only_where_there_is_one() -> None:
    assert "Requires=sds-agent.socket" in service(PLAN, with_socket=True)
    assert not any("sds-agent.socket" in line for line in service(PLAN))


def test_the_agent_may_give_its_socket_to_the_group_of_the_envoys() -> None:
    lines = service(PLAN)
    assert lines.index("SystemCallFilter=@chown") > lines.index("SystemCallFilter=~@privileged @resources")
    assert "Group=envoy" in lines, "systemd gives the directory, with the socket in it, to the user and the group"


def test_the_sockets_directory_outlives_a_restart() -> None:
    assert {"RuntimeDirectory=sds-agent", "RuntimeDirectoryPreserve=yes"} <= set(service(PLAN))


def test_directories_elsewhere_are_writable() -> None:
    lines = service(changed(runtime=None, state=None, writable=(Path("/srv/state"), Path("/srv/a b"))))
    assert {"ReadWritePaths=/srv/state", 'ReadWritePaths="/srv/a b"'} <= set(lines)
    assert not any(line.startswith(("RuntimeDirectory=", "StateDirectory=")) for line in lines)


def test_a_secret_file_comes_as_a_credential_and_its_key_leads_to_it() -> None:
    lines = service(changed(credentials={"SDS_AGENT__AUTHORITIES__CA__TOKEN_FILE": Path("/etc/sds-agent/token")}))
    assert "LoadCredential=authorities.ca.token_file:/etc/sds-agent/token" in lines
    assert "Environment=SDS_AGENT__AUTHORITIES__CA__TOKEN_FILE=%d/authorities.ca.token_file" in lines


@pytest.mark.parametrize(
    ("command", "written"),
    [
        ("/opt/a b/sds-agent", '"/opt/a b/sds-agent"'),
        ("/opt/50%/sds-agent", '"/opt/50%%/sds-agent"'),
        ('/opt/"/sds-agent', '"/opt/\\"/sds-agent"'),
    ],
)
def test_a_path_with_odd_characters_stays_one_word(command: str, written: str) -> None:
    assert f"ExecStart={written} run /etc/sds-agent/sds-agent.yaml" in service(changed(command=command))


def test_the_other_paths_stay_as_they_are() -> None:
    """systemd would put the boot's ID for %b, and make two directories of one with a space."""
    plan = changed(
        socket=Path("/run/a%b c/sds.sock"),
        runtime="a%b c",
        state="d e",
        credentials={"SDS_AGENT__X": Path("/etc/50% x/token")},
    )
    listening, lines = files(plan, with_socket=True)[-1].text.splitlines(), service(plan)
    assert "ListenStream=/run/a%%b c/sds.sock" in listening
    assert {'RuntimeDirectory="a%%b c"', 'StateDirectory="d e"', "LoadCredential=x:/etc/50%% x/token"} <= set(lines)


def test_a_program_in_a_home_can_be_started() -> None:
    assert "ProtectHome=read-only" in service(changed(at_home=True))
    assert "ProtectHome=yes" in service(PLAN)


def test_the_key_of_the_state_comes_as_the_credential_that_the_configuration_names() -> None:
    """Without the line the agent finds no directory of credentials, and ends each time that it is started."""
    assert "LoadCredentialEncrypted=sds-agent-state" in service(changed(state_credential="sds-agent-state"))
    assert not [line for line in service(PLAN) if line.startswith("LoadCredential")]
