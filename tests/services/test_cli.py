"""The command as its users call it: what it says, where it says it and the exit code, never a traceback."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import msgspec
import pytest
import yaml
from cryptography.hazmat.backends.openssl import backend
from fakes.configurations import MINIMAL
from fakes.envoy_admin import admin_interface
from fakes.hierarchy import NOW
from fakes.observed import Seen, workload

from sds_agent import __version__
from sds_agent.admin.view import status
from sds_agent.cli.main import guarded, main
from sds_agent.cli.ready import sockets
from sds_agent.config.loading import load
from sds_agent.config.schema import json_schema
from sds_agent.errors import ConfigurationError, ProblemsError, SdsAgentError

COMMAND = [sys.executable, "-m", "sds_agent"]
TWO_WORKLOADS = f"""{MINIMAL}\
    ttl: 2h
    key: rsa-2048
  - name: batch
    spiffe_id: spiffe://demo.example/batch
    ttl: 30d
sds: {{socket: /run/envoy/sds.sock, mode: "0600", owner: nobody-here, group: nothing-here}}
authorities:
  main: {{type: embedded, root_lifetime: 60d}}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path that belongs to us alone: a socket's path has little room."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The test's own environment, with all of the agent's places in `folder`."""
    ours = {name: value for name, value in os.environ.items() if not name.upper().startswith("SDS_AGENT")}
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HOME": str(folder), "PYTHONUNBUFFERED": ""}
    places = {"SDS_AGENT__SDS__SOCKET": str(folder / "s.sock"), "SDS_AGENT__STATE_DIR": str(folder / "state")}
    return ours | own | places | more


def call(folder: Path, *arguments: str, stdout: int = subprocess.PIPE, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=environment(folder, **more),
        stdout=stdout,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


def file(folder: Path, text: str) -> str:
    path = folder / "sds-agent.yaml"
    path.write_text(text)
    return str(path)


# Calls


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["ca", "--help"], ["chekc"]])
def test_what_needs_no_command_waits_for_no_command_and_no_library(folder: Path, arguments: list[str]) -> None:
    program = (
        f"import sys; from sds_agent.cli.main import main; main({arguments!r}); "
        "print('imported:', *sorted(n for n in sys.modules if n.partition('.')[0] in "
        "{'grpc', 'cryptography', 'msgspec', 'yaml', 'anyio', 'asyncio', 'sds_agent'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(folder), capture_output=True, text=True, check=True
    )
    ours = ["", ".cli", ".cli.commands", ".cli.main", ".cli.output", ".cli.parser", ".errors", ".rpc", ".rpc.core"]
    assert done.stdout.splitlines()[-1] == " ".join(["imported:", *(f"sds_agent{name}" for name in ours)])


@pytest.mark.parametrize(
    ("variable", "ours"), [("GRPC_VERBOSITY", "NONE"), ("GRPC_EXPERIMENTS", "-event_engine_listener")]
)
@pytest.mark.parametrize("wanted", [None, "", "debug"])
def test_grpc_is_set_up_before_it_is_imported_unless_the_user_has_set_it_up(
    folder: Path, variable: str, ours: str, wanted: str | None
) -> None:
    """It reads these once, and would then write to standard error beside our log, or read connections at a higher
    price.
    """
    program = f"import os; from sds_agent.cli.main import main; main(['chek']); print(os.environ['{variable}'])"
    surroundings = environment(folder) if wanted is None else environment(folder, **{variable: wanted})
    done = subprocess.run([sys.executable, "-c", program], env=surroundings, capture_output=True, text=True, check=True)
    assert done.stdout == f"{ours if wanted is None else wanted}\n"


@pytest.mark.parametrize(
    "command", ["run", "ready", "status", "explain web", "secret", "doctor", "envoy-config default"]
)
@pytest.mark.parametrize(
    ("path", "said"), [("", "it is empty"), ("/", "it is a directory"), (".", "it is a directory")]
)
def test_a_socket_without_a_name_is_a_wrong_call(
    command: str, path: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as where a variable of the shell is not set."""
    words = command.split()
    assert main([*words, "--socket", path]) == 2
    assert capsys.readouterr().err.startswith(
        f"sds-agent: {words[0]}: --socket: it must be the path of a socket such as /run/sds-agent/sds.sock; {said}; "
    )


@pytest.mark.parametrize(
    "command",
    [
        "check",
        "run",
        "status --config",
        "status --admin",
        "secret --envoy",
        "doctor --envoy",
        "issue --output",
        "install systemd --write --root",
        "envoy-config web --path-config",
        "ca root --trust-domain demo.example",
        "ca root new --trust-domain demo.example --passphrase-file",
        "ca intermediate new --name a --root",
        "ca check",
        "ca bundle --output",
        "ca serve",
        "ca token ca.yaml spiffe://demo.example/web --output",
    ],
)
def test_an_empty_path_is_not_the_working_directory(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`issue --output "$UNSET"` would replace the root-cert.pem of whatever directory it is called in."""
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), ""]) == 2
    assert "it is empty; is a variable of the shell not set?" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ready --socket", "--socket: it must be a path in UTF-8"),
        ("status --socket", "--socket: it must be a path in UTF-8"),
        ("envoy-config default --socket", "--socket: it must be a path in UTF-8"),
        ("envoy-config default --path-config", "--path-config: it must be a path in UTF-8"),
        ("issue --output", "--output: it must be a path in UTF-8"),
        ("secret web", "NAME: a resource name is text in UTF-8"),
        ("secret --timeout", "--timeout: '\\udcff' is no number of seconds above 0, and up to 3600"),
    ],
)
def test_bytes_that_are_no_text_are_refused_where_text_is_needed(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.split()
    assert main([*words, "\udcff"]) == 2
    assert capsys.readouterr().err.startswith(f"sds-agent: {words[0]}: {said}; ")


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan", "3601", "1e300"])
def test_a_time_to_wait_that_cannot_be_waited_for_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1e10 seconds gRPC makes a time that is past: each secret was said not to be issued yet."""
    assert main(["secret", "web", f"--timeout={seconds}"]) == 2
    assert "no number of seconds above 0, and up to 3600" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["SDS_AGENT__SDS__SOCKET", "sds_agent__sds__socket"])
def test_no_other_agent_is_asked_than_the_one_that_a_variable_names(variable: str) -> None:
    """Else a health check would be content with the agent on the defaults."""
    assert sockets(None, {variable: "/run/web/sds.sock"}) == (Path("/run/web/sds.sock"),)
    assert len(sockets(None, {"RUNTIME_DIRECTORY": "/run/web"})) > 1


@pytest.mark.parametrize(
    ("seen", "code"),
    [(Seen(), 0), (Seen(workloads=(workload(None, served=False),), lacking=("web: not issued yet",)), 1)],
    ids=["ready", "not ready"],
)
@pytest.mark.parametrize("form", ["table", "json", "yaml"])
def test_the_exit_code_of_status_is_whether_the_agent_is_ready(
    seen: Seen, code: int, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with admin_interface({"/status": msgspec.json.encode(status(seen, NOW))}) as url:
        assert main(["status", "--admin", url, "-o", form]) == code
    assert "demo.example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("check --spend-token", "add --probe"),
        ("doctor --probe --socket sds.sock", "name the agent by --config"),
        ("doctor --probe --admin 127.0.0.1:9902", "name the agent by --config"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a script would take a CA for good that nobody has asked."""
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["run FILE --socket s", "envoy-config default --config FILE --socket s", "install systemd none.yaml"]
)
def test_a_path_from_a_working_directory_that_was_removed_is_no_traceback(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, gone = file(tmp_path, MINIMAL), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        assert main(command.replace("FILE", path).split()) == 2
    finally:
        os.chdir(tmp_path)
    assert capsys.readouterr().err == "sds-agent: the working directory was removed; change to another one\n"


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_printed(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert capsys.readouterr().out == f"sds-agent {__version__}\n"


@pytest.mark.parametrize("form", ["json", "yaml", "table"])
def test_a_report_of_a_fault_can_name_every_version(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "-o", form]) == 0
    said = capsys.readouterr().out
    read = dict(line.split(None, 1) for line in said.splitlines()[1:]) if form == "table" else yaml.safe_load(said)
    assert read["version"] == __version__
    assert read["python"] == platform.python_version()
    assert read["openssl"] in backend.openssl_version_text()
    assert list(read) == ["version", "python", "grpc", "cryptography", "openssl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chekc"], "'chekc' is no command; did you mean check?"),
        (["stat"], "'stat' is no command; did you mean status?"),
        (["xyzzy"], "'xyzzy' is no command; sds-agent --help lists them"),
        (["ca", "chek"], "ca: 'chek' is no command; did you mean check?"),
        (["help", "ca", "chek"], "ca: 'chek' is no command; did you mean check?"),
        (["help", "run", "now"], "run: there is no command 'now' below it; sds-agent run --help explains the call"),
        (["--verison"], "there is no option '--verison'; did you mean --version?"),
        (["--log-level", "debug", "run"], "there is no option '--log-level'; the options of a command"),
        (["run", "--log-lvel=debug"], "run: there is no option '--log-lvel'; did you mean --log-level?"),
        (["run", "--xyzzy"], "run: there is no option '--xyzzy'; sds-agent run --help explains the call"),
        (["run", "a", "b"], "run: 'b' is one argument too many; sds-agent run --help explains the call"),
        (["run", "--log-level", "loud"], "run: --log-level: 'loud' is not one of debug, info, warning, err"),
        (["ca", "root"], "ca root: the following arguments are required: DIR, --trust-domain; "),
        (["ch\x1bek" + "k" * 300], "'ch\\x1bek"),
    ],
)
def test_a_wrong_call_is_explained_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"sds-agent: {said}")
    assert (shown.err.count("\n"), shown.out) == (1, "")
    assert len(shown.err) < 200, "no list of every command there is"


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        ([], ["--help"]),
        (["help"], ["--help"]),
        (["ca"], ["ca", "--help"]),
        (["help", "ca", "root"], ["ca", "root", "-h"]),
    ],
)
def test_help_is_where_people_expect_it(
    arguments: list[str], same: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: sds-agent")
    assert main(same) == 0
    assert (capsys.readouterr().out, said.err) == (said.out, "")


@pytest.mark.parametrize("command", ["run", "check", "ready", "schema"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: sds-agent {command}" in said
    assert "Exit codes: 0 " in said, "scripts and service managers go by them"


def test_the_schema_is_printed_for_an_editor(folder: Path) -> None:
    done = call(folder, "schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema()


@pytest.mark.parametrize(
    "command",
    ["root", "intermediate", "check", "bundle", "serve", "token make", "token list", "token withdraw", "schema"],
)
def test_every_command_of_the_ca_lists_its_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", *command.split(), "--help"]) == 0
    assert "Exit codes: 0 " in capsys.readouterr().out


# check


@pytest.mark.parametrize(
    "command", ["run", "check", "ready", "issue --output -", "install systemd", "ca serve"], ids=lambda each: each[:5]
)
def test_a_file_is_named_by_position_or_by_option_and_not_by_both(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, path = command.split(), str(folder / "none.yaml")
    said = []
    for named in ([path], ["--config", path], [f"--config={path}"]):
        assert main([*words, *named]) == 2
        said.append(capsys.readouterr().err)
        assert f"{path}: the file does not exist" in said[0]
    assert len(set(said)) == 1
    assert main([*words, path, "--config", path]) == 2
    assert ": --config: not allowed with argument FILE; " in capsys.readouterr().err


Check = Callable[..., tuple[int, str, str]]
"""Checks a file, or the defaults for None, with these variables: the exit code and what was said on both outputs."""


@pytest.fixture
def check(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    def checked(path: str | None, **more: str) -> tuple[int, str, str]:
        for name, value in environment(folder, **more).items():
            monkeypatch.setenv(name, value)
        code = main(["check"] if path is None else ["check", path])
        said = capsys.readouterr()
        return code, " ".join(said.out.split()), said.err

    return checked


def test_check_explains_what_an_envoy_will_get_also_for_another_machine(folder: Path, check: Check) -> None:
    code, said, _ = check(file(folder, TWO_WORKLOADS))
    assert code == 3, "this one has neither the user nor the group"
    assert f"It listens on the socket {folder}/s.sock, which has the mode 0600" in said
    assert "the user nobody-here and the group nothing-here" in said
    assert "by the name default or spiffe://demo.example/web." in said
    assert "by the name batch or spiffe://demo.example/batch." in said
    assert "by the name ROOTCA or spiffe://demo.example." in said
    assert "The key is of the kind rsa-2048; a certificate comes from the authority main" in said
    assert "is asked to be valid for 2h and is renewed between 54m and 1h6m after its issue, the first one" in said
    assert "SDS_AGENT__SDS__SOCKET" in said


def test_check_says_of_which_files_an_envoy_can_have_the_keys(folder: Path, check: Check) -> None:
    assert "file-cert:" not in check(file(folder, MINIMAL))[1]
    said = check(file(folder, f"{MINIMAL}sds: {{files: [/etc/certs, /srv/tls]}}\n"))[1]
    assert "in files below /etc/certs and /srv/tls, by the names file-cert:CERTIFICATE~KEY and file-root:ROOTS." in said


def test_check_says_for_whom_a_certificate_is(folder: Path, check: Check) -> None:
    everybody = "each of them can have every certificate and key below. "
    assert everybody in check(file(folder, MINIMAL))[1]
    said = check(file(folder, f"{MINIMAL}    clients: {{users: [root, '4711'], groups: ['4712']}}\n"))[1]
    assert "each of them can have every certificate and key below but what is for some of them. " in said
    assert "if its process is of the users root and 4711 or of the group 4712. " in said


def test_check_separates_what_is_probably_not_meant_from_what_keeps_the_agent_from_starting(
    folder: Path, check: Check
) -> None:
    code, _, reported = check(file(folder, TWO_WORKLOADS))
    assert code == 3
    warning, summary, owner, group = reported.splitlines()
    assert warning.startswith("sds-agent: warning: authorities.main.root_lifetime: ")
    assert summary.startswith("sds-agent: the configuration is good, but the agent cannot start here as uid ")
    assert owner.startswith("sds-agent: sds.owner: there is no user 'nobody-here' on this machine")
    assert group.startswith("sds-agent: sds.group: there is no group 'nothing-here' on this machine")


def test_check_warns_of_a_variable_that_sets_nothing_for_want_of_an_underscore(folder: Path, check: Check) -> None:
    """Else the agent runs with another socket, or with its state in another place, than its operator believes."""
    of_kubernetes = {"SDS_AGENT_SERVICE_HOST": "10.0.0.1", "SDS_AGENT_PORT": "tcp", "SDS_AGENT_ADMIN_PORT": "tcp"}
    more = {"SDS_AGENT_DUMPABLE": "0", "SDS_AGENT_STATE_DIR": "/x", "SDS_AGENT_SDS__SOCKET": "/y"}
    code, _, warned = check(file(folder, MINIMAL), **of_kubernetes, **more)
    assert code == 0
    assert warned.splitlines() == [
        f"sds-agent: warning: $SDS_AGENT_{rest} sets nothing: two underscores stand behind SDS_AGENT, as in "
        f"$SDS_AGENT__{rest}"
        for rest in ("SDS__SOCKET", "STATE_DIR")
    ]


def test_check_warns_of_an_authority_that_no_workload_uses(folder: Path, check: Check) -> None:
    text = f"{MINIMAL}    authority: a\nauthorities:\n  a: {{type: embedded}}\n  b: {{type: embedded}}\n"
    _, _, warned = check(file(folder, text))
    (warning,) = warned.splitlines()
    assert (
        "warning: authorities.b: no workload gets its certificate from it, and the roots that it advertises" in warning
    )


ISTIO = (
    "authorities:\n"
    "  mesh: {type: istio, address: 'ca.example:1', ca_file: roots.pem, token_file: token, extra_anchors: more.pem}\n"
)


def test_check_warns_of_files_of_an_authority_that_are_not_there(folder: Path, check: Check) -> None:
    """They may come later; the agent starts without them and asks again and again."""
    (folder / "token").touch(0o600)
    (folder / "token").write_text("a.token.x")
    code, _, warned = check(file(folder, MINIMAL + ISTIO))
    assert code == 0
    for key, name in (("ca_file", "roots.pem"), ("extra_anchors", "more.pem")):
        assert f"warning: authorities.mesh.{key}: {folder / name} does not exist" in warned
    assert "token_file" not in warned


def make_root(file: Path) -> None:
    made = file.with_name("root")
    assert main(["ca", "root", str(made), "--trust-domain", "demo.example"]) == 0
    (made / "root-cert.pem").rename(file)


def test_check_does_not_say_of_a_spent_join_token_that_no_certificate_comes_without_it(
    folder: Path, check: Check
) -> None:
    """Who removed it, as the page on the first machine says, has an agent that renews with its certificate."""
    make_root(folder / "roots.pem")
    (folder / "more.pem").touch()
    _, _, warned = check(file(folder, MINIMAL + ISTIO))
    (warning,) = warned.splitlines()
    assert warning.endswith("from this authority, unless it renews with the current certificate")


def test_check_does_not_promise_a_renewal_by_the_certificate_where_the_ca_takes_none(
    folder: Path, check: Check
) -> None:
    """To Vault the agent logs in for each certificate: without the token it gets none."""
    make_root(folder / "roots.pem")
    vault = (
        "type: vault, url: 'https://127.0.0.1:1', ca_file: roots.pem, role: a, auth: {type: token, token_file: gone}"
    )
    _, _, warned = check(file(folder, f"{MINIMAL}authorities: {{up: {{{vault}}}}}\n"))
    (warning,) = warned.splitlines()
    assert warning.endswith("/gone does not exist; until it does, no certificate comes from this authority")


def test_a_peer_of_another_trust_domain_is_not_let_in_by_its_name_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Envoy would refuse each of its certificates, and the configuration looks as if it did not."""
    peers = ["--peer", "spiffe://demo.example/a", "--peer", "spiffe://partner.example/b"]
    assert main(["envoy-config", "default", "--config", file(folder, MINIMAL), *peers]) == 0
    assert capsys.readouterr().err == (
        "sds-agent: warning: --peer: partner.example is another trust domain than demo.example: such a peer is "
        "accepted only if a root in ROOTCA vouches for it. The roots of a federated one are in spiffe://partner.example\n"
    )


def test_check_warns_of_a_hook_that_is_no_program_here(folder: Path, check: Check) -> None:
    """Else a web server learns of no renewal, until its certificate has expired."""
    hooks = f"on_renewed: [no-program-here], on_failed: [{sys.executable}, x]"
    code, _, warned = check(file(folder, f"{MINIMAL}    output: {{directory: certs, {hooks}}}\n"))
    assert code == 0
    assert warned == (
        "sds-agent: warning: workloads[0].output.on_renewed: there is no program 'no-program-here' here; install it, "
        "or name it by its path\n"
    )


def test_check_says_what_is_wrong_with_the_roots_of_a_cas_server(folder: Path, check: Check) -> None:
    """A file in DER, or an empty one, vouches for no server: the agent would start, and get no certificate."""
    (folder / "token").touch(0o600)
    (folder / "token").write_text("a.token.x")
    (folder / "more.pem").touch()
    (folder / "roots.pem").write_bytes(b"\x30\x82\x01\x00")
    _, _, warned = check(file(folder, MINIMAL + ISTIO))
    (warning,) = warned.splitlines()
    assert "warning: authorities.mesh.ca_file: cannot be used: " in warning
    assert "roots.pem should hold the roots that vouch for the CA's server and is in DER; convert it to PEM" in warning
    (folder / "roots.pem").unlink()
    _, _, warned = check(file(folder, MINIMAL + ISTIO))
    (warning,) = warned.splitlines()
    assert "roots.pem does not exist; until it does, no certificate comes from this authority" in warning


def test_check_says_once_of_a_credential_that_it_is_not_there(folder: Path, check: Check) -> None:
    keys = "type: est, url: 'https://127.0.0.1:1', ca_file: here, username: agent, password_file: absent"
    make_root(folder / "here")
    _, _, warned = check(file(folder, f"{MINIMAL}authorities: {{up: {{{keys}}}}}\n"))
    (warning,) = warned.splitlines()
    assert f"authorities.up.password_file: {folder / 'absent'} does not exist" in warning


def test_check_warns_of_a_token_that_every_user_can_read(folder: Path, check: Check) -> None:
    (folder / "token").touch()
    (folder / "token").chmod(0o604)
    code, _, warned = check(file(folder, MINIMAL + ISTIO))
    assert code == 0
    assert f"authorities.mesh.token_file: every user can read the secret in {folder / 'token'} (chmod o-r" in warned


def test_check_says_where_the_agent_sends_what_it_measures(folder: Path, check: Check) -> None:
    """Who reviews a configuration sees what leaves the machine, and that the collector's token is open or missing."""
    section = "telemetry: {otlp_endpoint: 'https://collector.example', interval: 30s, headers_file: headers}\n"
    configuration = file(folder, MINIMAL + section)
    code, said, warned = check(configuration)
    assert code == 0
    sent = f"over OTLP to https://collector.example, with the headers in {folder / 'headers'}."
    assert "Every 30s it sends its metrics, and a span for each attempt at an authority, " in " ".join(said.split())
    assert sent in " ".join(said.split())
    assert f"telemetry.headers_file: {folder / 'headers'} does not exist; until it does, nothing is sent" in warned
    (folder / "headers").write_text("Authorization: Bearer t\n")
    (folder / "headers").chmod(0o644)
    assert f"telemetry.headers_file: every user can read the secret in {folder / 'headers'}" in check(configuration)[2]
    (folder / "headers").chmod(0o640)
    assert check(configuration)[2] == ""


def test_check_goes_on_where_it_cannot_examine_a_file(folder: Path, check: Check) -> None:
    """Such as for a token that only the agent's user may see; a name that cannot be stops root too."""
    hidden = folder / ("n" * 300)
    code, _, warned = check(file(folder, MINIMAL + ISTIO.replace(" token,", f" '{hidden}',")))
    assert code == 0
    assert f"authorities.mesh.token_file: {hidden} cannot be examined (File name too long); the agent's user" in warned


@pytest.mark.parametrize(
    ("keep", "said"), [("false", "stores no certificates and keys"), ("true", "and their private keys, so")]
)
def test_check_says_whether_keys_are_written_to_disk(keep: str, said: str, folder: Path, check: Check) -> None:
    _, reported, _ = check(file(folder, f"{MINIMAL}keep_certificates: {keep}\n"))
    assert said in reported


@pytest.mark.parametrize(("keep", "warns"), [("false", True), ("true", False)])
def test_check_warns_where_a_restart_would_leave_the_agent_with_a_spent_token(
    keep: str, warns: bool, folder: Path, check: Check
) -> None:
    text = (
        f"{MINIMAL}keep_certificates: {keep}\nauthorities:\n"
        "  b: {type: istio, address: 'ca.example:15012', ca_file: roots.pem, token_file: token}\n"
    )
    for name in ("token", "roots.pem"):
        (folder / name).touch()
    _, _, warned = check(file(folder, text))
    assert ("warning: keep_certificates: it is false" in warned) == warns


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_directory_too_long_for_a_socket_is_reported_by_both(command: str, folder: Path) -> None:
    done = call(folder, command, SDS_AGENT__SDS__SOCKET=f"/{'d' * 99}/s")
    assert done.returncode == 2
    assert "it, or a temporary name beside it, has 108 bytes" in done.stderr


def test_check_takes_a_steady_renewal_and_a_name_that_is_an_id(folder: Path, check: Check) -> None:
    text = f"{MINIMAL.replace('name: default', 'name: spiffe://demo.example/web')}renewal: {{jitter: 0}}\n"
    _, said, _ = check(file(folder, text))
    assert "by the name spiffe://demo.example/web. The key" in said
    assert "is renewed 12h after its issue. " in said


@pytest.mark.parametrize("command", ["check", "run"])
def test_every_problem_of_a_configuration_is_reported_and_the_exit_code_is_2(command: str, folder: Path) -> None:
    path = file(folder, f"{MINIMAL}    ttl: 1s\n    kee: ec-p256\n")
    done = call(folder, command, path, SDS_AGENT__LOG__LEVEL="loud")
    assert (done.returncode, done.stdout) == (2, "")
    starts = [f"{path}:5: workloads[0].ttl", f"{path}:6: workloads[0].kee", "$SDS_AGENT__LOG__LEVEL: log.level"]
    lines = done.stderr.splitlines()
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"sds-agent: {start} is ")


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(("name", "said"), [("none", "does not exist"), ("", "this is a directory")])
def test_a_file_that_cannot_be_read_is_reported(command: str, name: str, said: str, folder: Path) -> None:
    done = call(folder, command, str(folder / name))
    assert done.returncode == 2
    assert done.stderr.startswith(f"sds-agent: {folder / name}: ")
    assert said in done.stderr


# Outputs that do not take what is said


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["check"], ["schema"], ["--help"], ["--version"]])
def test_a_reader_that_has_left_is_no_error_worth_a_word(arguments: list[str], unbuffered: str, folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = call(folder, *arguments, stdout=writer, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["check"], ["--help"]])
def test_a_full_disk_is_reported(arguments: list[str], folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = call(folder, *arguments, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr.startswith("sds-agent: cannot write to standard output: No space left on device")


@pytest.mark.parametrize("lost", ["the reader has left", "the disk is full"])
@pytest.mark.parametrize(("arguments", "code"), [(["ready", "--socket", "/no"], 1), (["chekc"], 2), (["run", "x"], 2)])
def test_errors_that_nobody_reads_change_no_exit_code(arguments: list[str], code: int, lost: str, folder: Path) -> None:
    """As in `sds-agent check 2>&1 | head -1`: a script goes by the code."""
    if lost == "the disk is full":
        errors = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, errors = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments], env=environment(folder), stdout=subprocess.DEVNULL, stderr=errors, check=False
        )
    finally:
        os.close(errors)
    assert done.returncode == code


def test_a_terminal_without_unicode_shows_names_all_the_same(folder: Path) -> None:
    done = call(
        folder, "check", file(folder, MINIMAL.replace("name: default", "name: größe")), PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0
    assert "The workload gr\\xf6\\xdfe has" in done.stdout


@pytest.mark.parametrize(
    "command",
    ["check -o json", "check -o yaml", "envoy-config größe-木 -o json", "envoy-config größe-木", "issue --output -"],
)
def test_a_program_reads_the_same_names_where_output_is_not_unicode(command: str, folder: Path) -> None:
    path = file(folder, MINIMAL.replace("name: default", "name: größe-木"))
    done = subprocess.run(
        [*COMMAND, *command.split(), "--config", path],
        env=environment(folder, PYTHONIOENCODING="ascii", PYTHONUTF8="1"),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode in {0, 3}
    text = done.stdout.decode("ascii")
    read = [json.loads(text)] if "json" in command or "issue" in command else list(yaml.safe_load_all(text))
    assert "größe-木" in json.dumps(read, ensure_ascii=False)


@pytest.mark.parametrize(("arguments", "code"), [(["check"], 0), (["check", "none"], 2), (["--none"], 2)])
def test_closed_outputs_are_no_error(arguments: list[str], code: int, folder: Path) -> None:
    """As a daemon's parent may leave them."""
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *COMMAND, *arguments]
    assert subprocess.run(command, env=environment(folder), check=False).returncode == code


def test_no_file_or_socket_takes_the_place_of_a_closed_output(folder: Path) -> None:
    """What a library writes to standard error would go into it, perhaps an Envoy's connection."""
    program = (
        "import os, pathlib; from sds_agent.cli.main import main; main(['--version']); "
        "places = [os.readlink(f'/proc/self/fd/{number}') for number in range(3)]; "
        "pathlib.Path('places').write_text(' '.join(places))"
    )
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program]
    subprocess.run(command, env=environment(folder), cwd=folder, check=True)
    assert (folder / "places").read_text() == "/dev/null /dev/null /dev/null"


# run


def started(folder: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(folder, **more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until_event(process: subprocess.Popen[str], name: str) -> list[str]:
    """The lines of standard error up to the event."""
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if line.startswith("{") and json.loads(line)["event"] == name:
            return lines
    raise AssertionError(f"no {name}: {lines}")


def test_run_without_a_file_says_where_it_serves_what(folder: Path) -> None:
    with started(folder, "run") as process:
        lines = until_event(process, "listening")
        assert (folder / "s.sock").is_socket()
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=30)
    assert (process.returncode, rest[0]) == (0, "")
    assert lines[0] == (
        "sds-agent: no configuration file: serving default (spiffe://sds-agent.local/default) on the socket "
        f"{folder}/s.sock, with state in {folder}/state\n"
    )
    configured = json.loads(lines[1])
    assert configured["event"] == "configured"
    assert configured["socket"] == f"{folder}/s.sock"
    assert configured["workloads"] == ["default"]
    assert configured["source"] == "the defaults, $SDS_AGENT__SDS__SOCKET and $SDS_AGENT__STATE_DIR"


def test_flags_override_the_log_settings_of_the_file(folder: Path) -> None:
    path = file(folder, f"{MINIMAL}log: {{level: error, format: json}}\n")
    flags = ["--log-format", "text", "--log-level", "info", "--socket", str(folder / "o.sock")]
    with started(folder, "run", path, *flags) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert " info    configured source=" in first
    assert f'$SDS_AGENT__STATE_DIR and --socket" socket={folder}/o.sock ' in first, "over the file and the variable"


def test_the_sockets_of_an_agent_are_where_the_command_says(folder: Path) -> None:
    """The admin socket goes with it, unless the file names a place."""
    path = Path(file(folder, f"{MINIMAL}sds: {{socket: of-the-file.sock}}\n"))
    found = load(path, {"SDS_AGENT__SDS__SOCKET": "of-the-variable.sock"}, socket=folder / "o.sock").settings
    assert (found.sds.socket, found.admin.socket) == (folder / "o.sock", folder / "o.admin.sock")
    placed = Path(file(folder, f"{MINIMAL}sds:\nadmin: {{socket: a.sock}}\n"))
    assert load(placed, {}, socket=folder / "o.sock").settings.admin.socket == folder / "a.sock"
    assert load(None, {}, socket=folder / "o.sock").settings.sds.socket == folder / "o.sock"
    with pytest.raises(ProblemsError, match=r"--socket: sds\.socket .*bytes"):
        load(None, {}, socket=Path(f"/{'s' * 200}"))


@pytest.mark.parametrize("command", ["run", "check"])
def test_an_interrupt_before_anything_runs_ends_quietly(command: str, folder: Path) -> None:
    """The file is a pipe: once we can open it for writing, the command waits to read it."""
    fifo = folder / "pipe"
    os.mkfifo(fifo)
    with started(folder, command, str(fifo)) as process, fifo.open("w"):
        process.send_signal(signal.SIGINT)
        reported = process.communicate(timeout=30)
    assert (process.returncode, *reported) == (130, "", "")


def test_what_keeps_the_agent_from_starting_is_one_sentence(folder: Path) -> None:
    folder.chmod(0o777)
    done = call(folder, "run", SDS_AGENT__LOG__LEVEL="error")
    assert done.returncode == 2
    assert f"sds-agent: state_dir: every user may write to {folder}" in done.stderr.splitlines()[-1]


def test_an_agent_that_runs_collects_garbage_but_for_what_its_start_left(folder: Path) -> None:
    """Its start does not; an agent without would grow with every connection."""
    folder.chmod(0o777)
    program = (
        "import gc; from sds_agent.cli.main import main\n"
        "print('exit code', main(['run']), 'collects', gc.isenabled(), 'passes over', gc.get_freeze_count() > 10_000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(folder), capture_output=True, text=True, check=True
    )
    assert done.stdout == "exit code 2 collects True passes over True\n"


# Errors


class CannotStartError(SdsAgentError):
    """An error for these tests."""


def raising(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CannotStartError("the socket is taken"), 1, "sds-agent: the socket is taken\n"),
        (ConfigurationError("no such key"), 2, "sds-agent: no such key\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            ExceptionGroup("", [ExceptionGroup("", [CannotStartError("one")]), ConfigurationError("two")]),
            1,
            "sds-agent: one\nsds-agent: two\n",
        ),
    ],
)
def test_an_error_becomes_a_sentence_and_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raising(error)) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("bug", [ValueError("x"), ExceptionGroup("", [CannotStartError("one"), ValueError("x")])])
def test_a_bug_is_not_hidden(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        guarded(raising(bug))


def test_programs_get_what_check_found_as_a_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = folder / "good.yaml", folder / "bad.yaml"
    good.write_text(f"{MINIMAL}state_dir: {folder}/state\nsds: {{socket: {folder}/sds.sock}}\n")
    assert main(["check", str(good), "-o", "json", "--probe"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["problems"], found["obstacles"], found["probes"][0]["good"]) == ([], [], True)
    assert any(f"{folder}/sds.admin.sock" in each for each in found["explanation"])
    bad.write_text(f"{MINIMAL}colour: red\n")
    assert main(["check", str(bad), "-o", "yaml"]) == 2
    captured = capsys.readouterr()
    (problem,) = yaml.safe_load(captured.out)["problems"]
    assert (problem["key"], problem["line"], captured.err) == ("colour", 5, "")


@pytest.mark.parametrize("made", [os.pipe, lambda: tuple(end.detach() for end in socket.socketpair())])
def test_a_watch_that_nobody_reads_ends_without_a_change(made: Callable[[], tuple[int, int]], folder: Path) -> None:
    """`status --watch | head -1` would keep the shell until a status changes, which may be tomorrow. What starts a
    program may read its output by a socket, as Node.js and ksh do.
    """
    answers = {"/livez": b"live\n", "/status": msgspec.json.encode(status(Seen(), NOW))}
    read_on = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            if self.path != "/events":
                self.wfile.write(answers[self.path])
                return
            self.wfile.write(b"event: status\n\n")
            read_on.wait(30)
            self.wfile.write(b": nothing new\n\n")
            self.rfile.read()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        command = [*COMMAND, "status", "--watch", "--admin", f"http://127.0.0.1:{server.server_port}"]
        reader, writer = made()
        with subprocess.Popen(command, env=environment(folder), stdout=writer) as watching:
            os.close(writer)
            try:
                assert os.read(reader, 1 << 16).startswith(b"ready"), "all of it, or closing would be an error to write"
                os.close(reader)
                read_on.set()
                assert watching.wait(30) == 141
            finally:
                watching.kill()
                server.shutdown()
