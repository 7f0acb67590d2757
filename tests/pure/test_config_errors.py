"""Every mistake in a configuration is reported, all at once: where it is, what was found and what is allowed."""

import os
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from fakes.configurations import MINIMAL, UID, problems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Meta, Struct

from sds_agent.authority.embedded import EmbeddedSettings
from sds_agent.ca.settings import load as load_ca
from sds_agent.config.loading import load
from sds_agent.configfile import reading
from sds_agent.configfile.declarations import selected
from sds_agent.configfile.document import Document, Origin
from sds_agent.configfile.phrases import render
from sds_agent.configfile.types import FilePath, matching
from sds_agent.errors import MOST_SHOWN, ConfigurationError, Problem, ProblemsError


@dataclass(frozen=True)
class Mistake:
    """Text of a file that has one mistake; `message` must stand in the one problem it gives."""

    text: str
    line: int
    key: str
    message: str


def workload(**keys: str) -> str:
    """A file with one workload, its keys changed; the workload begins on line 3."""
    merged = {"name": "default", "spiffe_id": "spiffe://demo.example/web"} | keys
    lines = [f"{name}: {value}" for name, value in merged.items()]
    return "trust_domain: demo.example\nworkloads:\n  - " + "\n    ".join(lines) + "\n"


ID = "spiffe://demo.example/web"
SECOND = f"{MINIMAL}  - name: {{name}}\n    spiffe_id: {{spiffe_id}}\n"
TWO_AUTHORITIES = "authorities:\n  a: {type: embedded}\n  b: {type: embedded}\n"

MISTAKES = {
    # keys
    "missing at the top": Mistake("workloads: [{name: a, spiffe_id: spiffe://a/b}]", 1, "trust_domain", "is missing"),
    "missing in an item": Mistake(
        "trust_domain: demo.example\nworkloads:\n  - name: a\n",
        3,
        "workloads[0].spiffe_id",
        "is missing; it must be a SPIFFE ID with a path such as spiffe://demo.example/web",
    ),
    "unknown": Mistake(
        f"{MINIMAL}sds: {{soket: /s}}\n",
        5,
        "sds.soket",
        "is not a known key; did you mean socket? (the keys here are files, group, limits, mode, owner, socket)",
    ),
    "unknown, like nothing": Mistake(f"{MINIMAL}'1 x': 2\n", 5, '"1 x"', "is not a known key; the keys here are"),
    "twice": Mistake(
        workload(key="ec-p256\n    key: ec-p384"), 6, "workloads[0].key", "is given twice (first on line 5)"
    ),
    "not text": Mistake(f"{MINIMAL}sds: {{1: x}}\n", 5, "sds", "has a key that is not text; write the key in quotes"),
    "a list as key": Mistake(f"{MINIMAL}? [a]\n: x\n", 5, "", "has a key that is not text"),
    "merging no mapping": Mistake(f"{MINIMAL}log: {{<<: text}}\n", 5, 'log."<<"', "does not name a mapping"),
    "a key of the state that is not named": Mistake(
        f"{MINIMAL}state_encryption: {{}}\n", 5, "state_encryption", "names no key; name the key: key_file for a file"
    ),
    "two keys of the state": Mistake(
        f"{MINIMAL}state_encryption: {{key_file: k, credential: k}}\n",
        5,
        "state_encryption.credential",
        "is given beside key_file; keep one of the two",
    ),
    "a credential that is a path": Mistake(
        f"{MINIMAL}state_encryption: {{credential: ../k}}\n",
        5,
        "state_encryption.credential",
        'is "../k"; it must be the name of a credential',
    ),
    # sections and lists
    "an empty section": Mistake(
        f"{MINIMAL}log:\n", 5, "log", "is empty; it must be a mapping with the keys format, level"
    ),
    "text for a section": Mistake(f"{MINIMAL}log: json\n", 5, "log", "is text; it must be a mapping"),
    "a flag for a section": Mistake(f"{MINIMAL}log: true\n", 5, "log", "is true or false; it must be a mapping"),
    "a number for a section": Mistake(f"{MINIMAL}log: 5\n", 5, "log", "is a number; it must be a mapping"),
    "a mapping for a list": Mistake(
        "trust_domain: a\nworkloads: {name: a}",
        2,
        "workloads",
        "is a mapping; it must be a list of one or more workloads",
    ),
    "no workload": Mistake("trust_domain: a\nworkloads: []", 2, "workloads", "is an empty list; it must be a list"),
    "no authority": Mistake(f"{MINIMAL}authorities: {{}}\n", 5, "authorities", "is an empty mapping; it must be"),
    "a list for a section": Mistake(f"{MINIMAL}sds: [a]\n", 5, "sds", "is a list; it must be a mapping"),
    # single values
    "trust domain in capitals": Mistake(
        MINIMAL.replace("demo", "Demo", 1),
        1,
        "trust_domain",
        'is "Demo.example"; it must be the name of a trust domain',
    ),
    "a number for text": Mistake(
        workload(name="5"), 3, "workloads[0].name", "is the number 5; it must be 1 to 255 printable characters"
    ),
    "a word that YAML takes for a flag": Mistake(
        workload(name="no"), 3, "workloads[0].name", "is no, which YAML reads as false"
    ),
    "an empty name": Mistake(workload(name="''"), 3, "workloads[0].name", 'is ""; it must be 1 to 255'),
    "a long name": Mistake(workload(name="n" * 256), 3, "workloads[0].name", "it has 256 characters"),
    "a control character": Mistake(workload(name='"a\\tb"'), 3, "workloads[0].name", 'is "a\\tb"; it must be'),
    "a file's name": Mistake(
        workload(name="file-cert:/a~/b"), 3, "workloads[0].name", "names with file-cert: and file-root: stand for files"
    ),
    "an ID that is none": Mistake(
        workload(spiffe_id="demo.example/web"), 4, "workloads[0].spiffe_id", "must begin with"
    ),
    "an ID without a path": Mistake(
        workload(spiffe_id="spiffe://demo.example"), 4, "workloads[0].spiffe_id", "it has no path"
    ),
    "an unknown kind of key": Mistake(
        workload(key="ec-p521"),
        5,
        "workloads[0].key",
        'is "ec-p521"; it must be one of ec-p256, ec-p384, rsa-2048, rsa-3072, rsa-4096; did you mean ec-p2',
    ),
    "a duration without unit": Mistake(
        workload(ttl="3600"), 5, "workloads[0].ttl", "a number alone has no unit: write 20s, 90m, 24h or 30d"
    ),
    "a duration that YAML counts in sixties": Mistake(
        workload(ttl="1:30"), 5, "workloads[0].ttl", "is 1:30, which YAML reads as the number 90"
    ),
    "a duration without unit in quotes": Mistake(
        workload(ttl="'24'"), 5, "workloads[0].ttl", "a number alone has no unit: write 20s, 90m, 24h or 30d"
    ),
    "a wrong unit": Mistake(workload(ttl="1w"), 5, "workloads[0].ttl", "the units are d, h, m, s and ms"),
    "a ttl too short": Mistake(workload(ttl="4s"), 5, "workloads[0].ttl", "between 5s and 90d; certificates count"),
    "a ttl too long": Mistake(workload(ttl="91d"), 5, "workloads[0].ttl", "between 5s and 90d; certificates count"),
    "a root too short-lived": Mistake(
        f"{MINIMAL}authorities: {{a: {{type: embedded, root_lifetime: 1s}}}}\n",
        5,
        "authorities.a.root_lifetime",
        "between 1m and 10950d",
    ),
    "a mode without quotes": Mistake(
        f"{MINIMAL}sds: {{mode: 0660}}\n",
        5,
        "sds.mode",
        'is 0660, which YAML reads as the number 432; it must be octal digits in quotes such as "0660"',
    ),
    "a mode that lets every user connect": Mistake(
        f"{MINIMAL}sds: {{mode: '0666'}}\n", 5, "sds.mode", "let others in through sds.group instead"
    ),
    "a mode that shuts out the owner": Mistake(f"{MINIMAL}sds: {{mode: '0060'}}\n", 5, "sds.mode", 'is "0060"'),
    "a group that is no name": Mistake(f"{MINIMAL}sds: {{group: a b}}\n", 5, "sds.group", "a name or a numeric id"),
    "a group that is a flag": Mistake(
        f"{MINIMAL}sds: {{group: yes}}\n", 5, "sds.group", "is yes, which YAML reads as true"
    ),
    "an id too large": Mistake(
        f"{MINIMAL}sds: {{owner: 4294967295}}\n", 5, "sds.owner", "ids lie between 0 and 4294967294"
    ),
    "a number that Python does not write out": Mistake(
        f"{MINIMAL}sds: {{group: 0x{'f' * 5000}}}\n", 5, "sds.group", "which YAML reads as a very large number"
    ),
    "a number that no float holds": Mistake(
        f"{MINIMAL}renewal: {{jitter: 0x{'f' * 5000}}}\n", 5, "renewal.jitter", "it must be a number from 0 to 0.1"
    ),
    "a count beyond all counts": Mistake(
        f"{MINIMAL}sds: {{limits: {{names: 0x{'f' * 5000}}}}}\n", 5, "sds.limits.names", "from 1 to 10000"
    ),
    "an empty path": Mistake(f"{MINIMAL}state_dir: ''\n", 5, "state_dir", 'is ""; it must be a path; it is empty'),
    "an unprintable path": Mistake(f'{MINIMAL}state_dir: "a\\0"\n', 5, "state_dir", "it holds unprintable characters"),
    "a home directory": Mistake(f"{MINIMAL}state_dir: ~/s\n", 5, "state_dir", "~ is not expanded here"),
    "a long socket path": Mistake(
        f"{MINIMAL}sds: {{socket: /{'s' * 107}}}\n",
        5,
        "sds.socket",
        "it, or a temporary name beside it, has 108 bytes: choose a shorter directory",
    ),
    "an address for a path": Mistake(f"{MINIMAL}sds: {{socket: 'unix:/s'}}\n", 5, "sds.socket", "no unix: before it"),
    "a number among the words of a hook": Mistake(
        f"{MINIMAL}    output: {{directory: o, on_renewed: [sleep, 5]}}\n",
        5,
        "workloads[0].output.on_renewed",
        "its item [1] is the number 5: write it in quotes",
    ),
    "a list among the words of a hook": Mistake(
        f"{MINIMAL}    output: {{directory: o, on_failed: [[sh]]}}\n",
        5,
        "workloads[0].output.on_failed",
        "its item [0] is a list",
    ),
    "a flag among authorities": Mistake(
        f"{MINIMAL}    authority: [local, no]\n",
        5,
        "workloads[0].authority",
        "its item [1] is false: write it in quotes",
    ),
    "a flag for a duration": Mistake(
        f"{MINIMAL}    ttl: true\n",
        5,
        "workloads[0].ttl",
        "and 90d; the units are d, h, m, s and ms, the largest first",
    ),
    "a socket without a name": Mistake(
        f"{MINIMAL}sds: {{socket: /}}\n", 5, "sds.socket", "it is a directory: name the socket in it"
    ),
    "a socket above": Mistake(f"{MINIMAL}admin: {{socket: s/..}}\n", 5, "admin.socket", "it is a directory: name"),
    "an abstract socket": Mistake(f"{MINIMAL}sds: {{socket: '@s'}}\n", 5, "sds.socket", "no abstract name"),
    "no stream": Mistake(f"{MINIMAL}sds: {{limits: {{streams: 0}}}}\n", 5, "sds.limits.streams", "from 1 to 1000000"),
    "half a stream": Mistake(
        f"{MINIMAL}sds: {{limits: {{streams: 1.5}}}}\n", 5, "sds.limits.streams", "is the number 1.5"
    ),
    "a flag for a number": Mistake(f"{MINIMAL}sds: {{limits: {{names: true}}}}\n", 5, "sds.limits.names", "is true;"),
    "a word for a number": Mistake(f"{MINIMAL}sds: {{limits: {{names: many}}}}\n", 5, "sds.limits.names", 'is "many"'),
    "no number at all": Mistake(f"{MINIMAL}renewal: {{fraction: .nan}}\n", 5, "renewal.fraction", "from 0.2 to 0.8"),
    "an endless number": Mistake(f"{MINIMAL}sds: {{limits: {{names: .inf}}}}\n", 5, "sds.limits.names", "from 1 to"),
    "too much jitter": Mistake(f"{MINIMAL}renewal: {{jitter: 0.2}}\n", 5, "renewal.jitter", "from 0 to 0.1"),
    "an authority's name": Mistake(
        f"{MINIMAL}authorities: {{Main: {{type: embedded}}}}\n", 5, "authorities.Main", "has a name that is not allowed"
    ),
    "an authority without type": Mistake(
        f"{MINIMAL}authorities:\n  main: {{}}\n", 6, "authorities.main.type", "is missing; it must be one of embedded"
    ),
    "an authority that is text": Mistake(
        f"{MINIMAL}authorities: {{main: embedded}}\n",
        5,
        "authorities.main",
        "it must be a mapping with a type (embedded, ",
    ),
    "an unknown type": Mistake(
        f"{MINIMAL}authorities: {{main: {{type: embeded}}}}\n", 5, "authorities.main.type", "did you mean embedded?"
    ),
    "a type that is a number": Mistake(
        f"{MINIMAL}authorities: {{main: {{type: 5}}}}\n", 5, "authorities.main.type", "is the number 5"
    ),
    # keys compared
    "the bundle's name": Mistake(
        workload(name="ROOTCA"), 3, "workloads[0].name", 'is "ROOTCA", a name of the trust bundle; choose another name'
    ),
    "the trust domain's ID": Mistake(
        workload(name="spiffe://demo.example"), 3, "workloads[0].name", "a name of the trust bundle"
    ),
    "one name twice": Mistake(
        SECOND.format(name="default", spiffe_id="spiffe://demo.example/b"),
        5,
        "workloads[1].name",
        'is "default", the name of workloads[0] too; names must differ',
    ),
    "another's ID as name": Mistake(
        SECOND.format(name=ID, spiffe_id="spiffe://demo.example/b"),
        5,
        "workloads[1].name",
        "which is also asked for as the SPIFFE ID of workloads[0]",
    ),
    "a later one's ID as name": Mistake(
        workload(name="spiffe://demo.example/b") + "  - {name: b, spiffe_id: spiffe://demo.example/b}\n",
        3,
        "workloads[0].name",
        "which is also asked for as the SPIFFE ID of workloads[1]",
    ),
    "one ID twice": Mistake(
        SECOND.format(name="b", spiffe_id=ID), 6, "workloads[1].spiffe_id", "the SPIFFE ID of workloads[0] too"
    ),
    "another trust domain": Mistake(
        workload(spiffe_id="spiffe://other.example/web"),
        4,
        "workloads[0].spiffe_id",
        'in the trust domain "other.example"; it must be in trust_domain, which is "demo.example"',
    ),
    "an unknown authority": Mistake(
        f"{workload(authority='mian')}authorities: {{main: {{type: embedded}}}}\n",
        5,
        "workloads[0].authority",
        'is "mian", which is no authority here; it must be one of main; did you mean main?',
    ),
    "an authority where none is configured": Mistake(
        workload(authority="other"), 5, "workloads[0].authority", "it must be one of local"
    ),
    "a choice not made": Mistake(
        f"{MINIMAL}{TWO_AUTHORITIES}", 3, "workloads[0].authority", "with several authorities it must be one of a, b"
    ),
    "an unknown authority among several": Mistake(
        f"{MINIMAL}    authority: [a, c]\n{TWO_AUTHORITIES}",
        5,
        "workloads[0].authority",
        'names "c", which is no authority here; it must be one of a, b',
    ),
    "an authority twice": Mistake(
        f"{MINIMAL}    authority: [a, b, a]\n{TWO_AUTHORITIES}",
        5,
        "workloads[0].authority",
        'names "a" more than once; name each authority once, in order',
    ),
    "a list of no authority": Mistake(
        f"{MINIMAL}    authority: []\n", 5, "workloads[0].authority", "or a list of 1 to 8 of them; it has 0 of them"
    ),
    "no name of an authority": Mistake(
        f"{MINIMAL}    authority: [local, My CA]\n", 5, "workloads[0].authority", "'My CA' is no such name: 1 to 63 of"
    ),
    "a number among the authorities": Mistake(
        f"{MINIMAL}    authority: [local, 7]\n", 5, "workloads[0].authority", "write it in quotes"
    ),
    "the state's directory for a socket": Mistake(
        f"{MINIMAL}state_dir: /run/a\nsds: {{socket: /run/b/../a}}\n",
        6,
        "sds.socket",
        "is the path of state_dir too; give it one of its own, or leave it out",
    ),
    "the state's directory for another socket": Mistake(
        f"{MINIMAL}state_dir: /run/a\nadmin: {{socket: /run/a/}}\n",
        6,
        "admin.socket",
        "is the path of state_dir too; give it one of its own, or leave it out",
    ),
    "an IPv6 address without brackets for a name": Mistake(
        f"{MINIMAL}admin: {{hosts: ['::1']}}\n", 5, "admin.hosts[0]", "or an IP address such as 127.0.0.1 or [::1]"
    ),
    "one socket for Envoys and for people": Mistake(
        f"{MINIMAL}sds: {{socket: /run/a/s}}\nadmin: {{socket: /run/a/../a/s}}\n",
        6,
        "admin.socket",
        "is the path of sds.socket too; give it one of its own, or leave it out",
    ),
    "clients who are nobody": Mistake(
        f"{MINIMAL}    clients: {{}}\n",
        5,
        "workloads[0].clients",
        "names nobody; name users, groups or both; left out, every process that may connect may ask",
    ),
    "an output for some where files are for everybody": Mistake(
        f"{MINIMAL}    clients: {{users: [envoy]}}\n    output: /srv/a/../tls/web\nsds: {{files: [/a, /srv/tls]}}\n",
        6,
        "workloads[0].output",
        'is below "/srv/tls", from where every process that may connect gets files (sds.files); write it elsewhere: '
        "clients says who may have its key",
    ),
    "an empty list of users": Mistake(
        f"{MINIMAL}    clients: {{users: [], groups: [envoy]}}\n", 5, "workloads[0].clients.users", "one or more users"
    ),
    # YAML itself
    "no UTF-8": Mistake("trust_domain: a\nworkloads: \udcff", 2, "", "the file is not text in UTF-8; save it as UTF-8"),
    "a tab": Mistake("trust_domain: a\nsds:\n\tmode: x\n", 3, "", "indent with spaces: YAML does not take tabs"),
    "an open quote": Mistake("trust_domain: 'a\n", 2, "", "the file is not valid YAML here"),
    "bad nesting": Mistake("a: b: c\n", 1, "", "check the indentation, quotes and brackets here"),
    "a control character in the file": Mistake("a: b\nc: \x07\n", 2, "", "the character U+0007"),
    "empty": Mistake("", 0, "", "the file is empty; the least it needs is trust_domain and one item of workloads"),
    "only a comment": Mistake("# nothing\n", 0, "", "the file is empty"),
    "only a document mark": Mistake("---\n", 0, "", "the file is empty"),
    "a list": Mistake("- a\n", 1, "", "the file does not begin with a mapping of keys"),
    "text": Mistake("hello\n", 1, "", "the file does not begin with a mapping of keys"),
    "two documents": Mistake(f"{MINIMAL}---\na: b\n", 5, "", "a second document begins here"),
    "an unknown anchor": Mistake("a: *b\n", 1, "", "the alias *b has no anchor"),
    "an alias inside itself": Mistake("a: &b [*b]\n", 1, "", "define &b before it is used, and outside itself"),
    "a tag": Mistake("a: !!python/name:os.system x\n", 1, "", "is not used here; remove it"),
    "a tag on a mapping": Mistake("!!set {a, b}\n", 1, "", "is not used here; remove it"),
    "a tag of another kind": Mistake("a: !!map x\n", 1, "", "is not used here; remove it"),
    "deep nesting": Mistake("[" * 500, 1, "", "nested more than 32 levels deep"),
    # libyaml since 0.2.6 says so itself beyond a thousand levels
    "bottomless nesting": Mistake("[" * 100_000, 1, "", "nest"),
    "an alias bomb": Mistake(
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 8)),
        1,
        "",
        "the file is too large once its aliases are followed",
    ),
    "a bomb of merge keys": Mistake(
        f"a: &a {{{', '.join(f'k{n}: 1' for n in range(3000))}}}\nb: [{', '.join(['{<<: *a}'] * 3000)}]\n",
        2,
        "",
        "the file is too large once its aliases are followed",
    ),
    "aliases that nest deeper than brackets may": Mistake(
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60)), 1, "", "is too large once"
    ),
    "a value that its tag does not fit": Mistake(
        f"{MINIMAL}log: {{level: !!int loud}}\n", 5, "log.level", "is not what YAML calls int; write it in quotes"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_reported_with_its_line_its_key_and_the_fix(mistake: Mistake, tmp_path: Path) -> None:
    found = problems(tmp_path, mistake.text.encode("utf-8", "surrogateescape"))
    matching = [each for each in found if mistake.message in str(each)]
    assert matching, [str(each) for each in found]
    assert (matching[0].key, matching[0].line) == (mistake.key, mistake.line)
    place = f"{tmp_path / 'sds-agent.yaml'}" + (f":{mistake.line}" if mistake.line else "")
    assert matching[0].where == (str(tmp_path / "sds-agent.yaml"),)
    assert str(matching[0]).startswith(f"{place}: {mistake.key}")


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_lines_do_not_depend_on_how_pyyaml_was_built(mistake: Mistake, tmp_path: Path) -> None:
    from sds_agent.configfile import source  # noqa: PLC0415 - as the loader does, only where there is a file

    def reported(loader: type[Any]) -> list[tuple[str, int]]:
        try:
            _, found = source.read(file, loader)
        except ProblemsError as error:
            found = list(error.problems)
        return [(each.key, each.line) for each in found]

    file = tmp_path / "sds-agent.yaml"
    file.write_bytes(mistake.text.encode("utf-8", "surrogateescape"))
    assert reported(source.LOADER) == reported(yaml.SafeLoader)


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
def test_an_escape_beyond_unicode_is_reported(loader: type[Any], tmp_path: Path) -> None:
    from sds_agent.configfile import source  # noqa: PLC0415 - as the loader does, only where there is a file

    file = tmp_path / "sds-agent.yaml"
    file.write_text('a: "\\Uffffffff"\n')
    with pytest.raises(ProblemsError, match="escape"):
        source.read(file, loader)


@pytest.mark.parametrize("form", ["<<: [{}]", "{}"])
def test_thousands_of_mappings_that_one_merges_take_no_time_to_speak_of(form: str, tmp_path: Path) -> None:
    """The time is the processor's, and a second; where each mapping copies those before it, it is more than 20."""
    from sds_agent.configfile import source  # noqa: PLC0415 - as the loader does, only where there is a file

    maps = [f"{{k{n}: 1}}" for n in range(30_000)]
    merging = form.format(", ".join(maps if "[" in form else [f"<<: {each}" for each in maps]))
    (tmp_path / "sds-agent.yaml").write_text(f"x: {{{merging}}}\n")
    began = time.process_time()
    document, found = source.read(tmp_path / "sds-agent.yaml")
    assert time.process_time() - began < 10
    assert (found, document.tree) == ([], {"x": {f"k{n}": 1 for n in range(30_000)}})


def test_all_mistakes_are_reported_at_once_in_the_files_order(tmp_path: Path) -> None:
    text = (
        "trust_domain: demo.example\n"
        "workloads:\n"
        "  - name: a\n"
        "    spiffe_id: spiffe://other.example/a\n"  # another trust domain: seen only when keys are compared
        "    ttl: 1s\n"
        "    ttl: 2s\n"  # given twice: seen by the reader of YAML
        "  - name: a\n"
        "    key: rsa\n"
        "unknown: 1\n"
    )
    found = problems(tmp_path, text, SDS_AGENT__LOG__LEVEL="loud", SDS_AGENT__LOG__COLOUR="red")
    assert [(each.line, each.key) for each in found] == [
        (4, "workloads[0].spiffe_id"),
        (5, "workloads[0].ttl"),
        (6, "workloads[0].ttl"),
        (7, "workloads[1].spiffe_id"),
        (7, "workloads[1].name"),
        (8, "workloads[1].key"),
        (9, "unknown"),
        (0, "log.colour"),
        (0, "log.level"),
    ]
    lines = str(ProblemsError(found)).splitlines()
    assert lines == [str(each) for each in found]


def test_a_configuration_error_ends_a_command_with_2() -> None:
    assert issubclass(ProblemsError, ConfigurationError)
    assert ProblemsError([]).exit_code == 2


def test_thousands_of_mistakes_do_not_flood_the_terminal() -> None:
    problem = Problem(("f",), "is wrong", "fix it", "a", 1)
    lines = str(ProblemsError([problem] * (MOST_SHOWN + 5))).splitlines()
    assert len(lines) == MOST_SHOWN + 1
    assert lines[-1] == "there are 5 more problems"


def test_a_long_value_is_quoted_in_part(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, workload(key="k" * 100_000))
    assert len(str(found)) < 600


def test_a_key_with_odd_characters_cannot_start_a_line_of_its_own() -> None:
    assert render(("a", 0, "b\nc d", "e")) == 'a[0]."b\\nc d".e'


# The file


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: the file does not exist; name one that does"


def test_a_directory_is_reported(tmp_path: Path) -> None:
    assert error_of(tmp_path) == f"{tmp_path}: this is a directory; name a file in it"


def test_a_file_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "the file cannot be read (Not a directory)" in error_of(tmp_path / "file" / "sds-agent.yaml")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    assert "the file is too large; 1048576 bytes are the most" in error_of(tmp_path / "huge")


@pytest.mark.parametrize(
    ("written", "helps"),
    [
        ("sds: {mode: 0660}", True),
        ("sds: {mode: 660}", True),
        ("sds: {mode: 666}", False),
        ("keep_certificates: 0", False),
        ("log: {level: 1}", False),
        ("admin: {address: 9902}", False),
        ("    output: 5", True),
    ],
)
def test_quotes_are_the_way_out_only_where_they_are(written: str, helps: bool, tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, f"{MINIMAL}{written}\n")
    assert ("write it in quotes" in problem.fix) is helps, str(problem)


def test_the_ca_servers_file_is_told_from_the_agents(tmp_path: Path) -> None:
    """Both name a trust domain; a list of unknown keys, each perhaps meant otherwise, would lead nobody on."""
    file = tmp_path / "file.yaml"
    file.write_text("trust_domain: demo.example\nsigner: {self_signed: root}\ncallers: {join_tokens: tokens}\n")
    assert error_of(file) == (
        f"{file}: this is a configuration of the CA server; name the agent's file; `sds-agent ca check` and "
        "`sds-agent ca serve` read this one"
    )
    file.write_text(MINIMAL)
    with pytest.raises(ProblemsError) as raised:
        load_ca(file)
    assert str(raised.value).startswith(f"{file}: this is a configuration of the agent; name the CA server's file")


def test_standard_input_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(Path("-")) == "-: the file does not exist; for standard input name /dev/stdin"


def error_of(path: Path) -> str:
    with pytest.raises(ProblemsError) as raised:
        load(path, {}, uid=UID)
    return str(raised.value)


# Variables


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SDS_AGENT__WORKLOADS__0__TTL", "1s", 'workloads[0].ttl is "1s"; it must be a duration'),
        ("SDS_AGENT__WORKLOADS__0__KEY", "rsa", 'workloads[0].key is "rsa"; it must be one of'),
        ("SDS_AGENT__SDS__SOKET", "/s", "sds.soket is not a known key; did you mean socket?"),
        (
            "SDS_AGENT__SDS_SOCKET",
            "/s",
            "sds_socket is not a known key; did you mean $SDS_AGENT__SDS__SOCKET? (the keys",
        ),
        ("SDS_AGENT__RENEWAL_JITTER", "0", "did you mean $SDS_AGENT__RENEWAL__JITTER?"),
        ("SDS_AGENT__SDS__LIMITS_NAMES", "9", "did you mean $SDS_AGENT__SDS__LIMITS__NAMES?"),
        ("SDS_AGENT__NONE", "1", "none is not a known key; the keys here are"),
        ("SDS_AGENT__", "1", "names no key; write SDS_AGENT__ and the parts of a key path"),
        ("SDS_AGENT__SDS__", "1", "names no key"),
        ("SDS_AGENT__SDS", "/s", "sds is text; it must be a mapping"),
        ("SDS_AGENT__SDS__MODE", "0666", 'sds.mode is "0666"; it must be octal digits'),
        ("SDS_AGENT__SDS__GROUP", "", 'sds.group is ""; it must be a name or a numeric id'),
        ("SDS_AGENT__SDS__LIMITS__NAMES", "1_0.5", 'sds.limits.names is "1_0.5"; it must be a whole number'),
        ("SDS_AGENT__SDS__LIMITS__NAMES", "9" * 5000, "it must be a whole number from 1 to 10000"),
        ("SDS_AGENT__WORKLOADS", "web", "workloads is text; it must be a list"),
        ("SDS_AGENT__WORKLOADS__WEB__TTL", "1h", "has web where the index of an item must be; workloads has 1 items"),
        (
            "SDS_AGENT__WORKLOADS__2__TTL",
            "1h",
            "has 2 where the index of an item must be; workloads has 1 items: use 0 to 1",
        ),
        ("SDS_AGENT__WORKLOADS__99999999999__TTL", "1h", "where the index of an item must be"),
        ("SDS_AGENT__WORKLOADS__1__NAME", "b", "workloads[1].spiffe_id is missing"),
        ("SDS_AGENT__WORKLOADS__0__NAME", "ROOTCA", 'workloads[0].name is "ROOTCA", a name of the trust bundle'),
        ("SDS_AGENT__TRUST_DOMAIN__X", "1", "leads into trust_domain, which is a single value"),
        ("SDS_AGENT__AUTHORITIES__NEW__KEY", "rsa-2048", "authorities.new.type is missing"),
        ("SDS_AGENT__STATE_DIR", "\udcff", "it holds unprintable characters"),
    ],
)
def test_an_error_about_a_variable_names_the_variable(variable: str, value: str, message: str, tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL, **{variable: value})
    assert {each.where for each in found} == {(f"${variable}",)}
    assert any(message in str(each) for each in found), [str(each) for each in found]


def test_two_variables_for_one_key_are_an_error(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL, SDS_AGENT__LOG__LEVEL="info", sds_agent__log__level="error")
    assert (
        str(found) == "$sds_agent__log__level: sets log.level, which $SDS_AGENT__LOG__LEVEL sets too; keep one of them"
    )


def test_a_variable_that_could_mean_two_authorities_is_an_error(tmp_path: Path) -> None:
    text = f"{MINIMAL}    authority: a-b_c\nauthorities:\n  a-b_c: {{type: embedded}}\n  a_b-c: {{type: embedded}}\n"
    (found,) = problems(tmp_path, text, SDS_AGENT__AUTHORITIES__A_B_C__KEY="rsa-2048")
    assert "could mean authorities.a-b_c and authorities.a_b-c; rename one" in str(found)


def test_a_default_that_cannot_be_used_names_the_variable_it_came_from(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    (found,) = problems(tmp_path, MINIMAL, XDG_RUNTIME_DIR=str(deep))
    assert str(found).startswith(f'$XDG_RUNTIME_DIR: sds.socket is "{str(deep)[:60]}')


@pytest.mark.parametrize("written", ["unix:/run/s.sock", "~/s.sock", "/", f"/{'s' * 107}"])
def test_what_is_wrong_with_the_socket_is_not_said_of_the_one_named_after_it(written: str, tmp_path: Path) -> None:
    found = problems(tmp_path, f"{MINIMAL}sds: {{socket: '{written}'}}\n")
    assert [each.key for each in found] == ["sds.socket"]


# Secrets, and sections that a type selects


class Token(Struct, frozen=True, kw_only=True, tag="token", tag_field="type"):
    """A kind of authority for this test, as another package could have one."""

    token_file: FilePath


KINDS = {"embedded": EmbeddedSettings, "token": Token}


class OneAuthority(Struct, frozen=True, kw_only=True):
    """A file with a single authority."""

    authority: Annotated[Token | EmbeddedSettings, selected(KINDS.get, lambda: KINDS)]


def read_authority(tree: object) -> tuple[Token | EmbeddedSettings | None, list[str]]:
    document = Document(tree={"authority": tree}, origins={(): Origin("f", 1)}, base=Path("/"))
    chosen, found = reading.read(OneAuthority, document)
    return (None if found else chosen.authority), [str(document.place(each)) for each in found]


def test_the_type_says_which_keys_there_are() -> None:
    assert read_authority({"type": "token", "token_file": "t"}) == (Token(token_file=Path("/t")), [])
    assert read_authority({"type": "embedded"}) == (EmbeddedSettings(), [])
    _, (reported,) = read_authority({"type": "token", "token_file": "t", "root_lifetime": "1h"})
    assert reported == "f:1: authority.root_lifetime is not a known key; the keys here are token_file, type"
    _, (reported,) = read_authority({"type": "tokn"})
    assert reported == 'f:1: authority.type is "tokn"; it must be one of embedded, token; did you mean token?'


class Values(Struct, frozen=True, kw_only=True):
    """Keys with the constraints that msgspec has, as another package could write them."""

    any: int = 0
    unbounded: float = 0
    least: Annotated[int, Meta(ge=1)] = 1
    most: Annotated[float, Meta(le=0.5)] = 0.5
    short: Annotated[str, Meta(max_length=3)] = "a"
    word: Annotated[str, matching("^[a-z]+$", "small letters")] = "a"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("any", "x", 'any is "x"; it must be a whole number'),
        ("unbounded", "nan", 'unbounded is "nan"; it must be a number'),
        ("least", 0, "least is the number 0; it must be a whole number of at least 1"),
        ("most", 0.6, "most is the number 0.6; it must be a number of at most 0.5"),
        ("most", float("nan"), "most is the number nan; it must be a number of at most 0.5"),
        ("most", "nan", 'most is "nan"; it must be a number of at most 0.5'),
        ("word", "ab c", 'word is "ab c"; it must be small letters'),
        ("word", "ab\n", 'word is "ab\\n"; it must be small letters'),
        ("short", "abcd", 'short is "abcd"; it must be 1 to 3 printable characters; it has 4 characters'),
    ],
)
def test_a_package_may_use_each_of_msgspecs_constraints(key: str, value: object, said: str) -> None:
    good = {"any": -(10**400), "least": 1, "most": -1e300, "short": "abc"}
    for tree, reported in ((good, []), (good | {key: value}, [f"f:1: {said}"])):
        document = Document(tree=tree, origins={(): Origin("f", 1)}, base=Path("/"))
        _, found = reading.read(Values, document)
        assert [str(document.place(each)) for each in found] == reported


class Impossible(Struct, frozen=True, kw_only=True):
    """A key of a type that nothing converts."""

    since: date


def test_a_package_learns_which_of_its_types_no_file_can_have() -> None:
    document = Document(tree={"since": "2026-01-01"}, origins={(): Origin("f", 1)}, base=Path("/"))
    with pytest.raises(TypeError, match="no configuration file can have DateType"):
        reading.read(Impossible, document)


SECRET = 5544332211


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "token", "token_file": [str(SECRET)]},
        {"type": "token", "token": str(SECRET)},
        {"type": "embedded", "token": str(SECRET)},
        str(SECRET),
        SECRET,
        [str(SECRET)],
    ],
)
def test_a_secret_in_a_wrong_place_is_not_shown(tree: object) -> None:
    read, reported = read_authority(tree)
    assert read is None
    assert reported
    assert str(SECRET) not in "".join(reported)


@pytest.mark.parametrize("url", ["https://reader:5544332211@ca.example/", "https://reader:55@44332211@ca.example?x"])
@pytest.mark.parametrize(
    "text",
    [
        "telemetry: {{otlp_endpoint: '{url}'}}\n",
        "authorities: {{a: {{type: step-ca, url: '{url}'}}}}\n",
        "authorities: {{a: {{type: istio, ca_file: r, address: '{url}'}}}}\n",
        "authorities: {{a: {{type: istio, ca_file: r, address: ['{url}']}}}}\n",
        "state_dir: [1]\nlog: {{level: '{url}'}}\n",
    ],
)
def test_the_password_in_a_url_is_not_shown(text: str, url: str, tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL + text.format(url=url))
    said = "".join(map(str, found))
    assert "//***@ca.example" in said
    assert "reader" not in said
    assert "44332211" not in said


# Whatever is in the file

FRAGMENTS = st.sampled_from(
    [
        ": ",
        "- ",
        "\n",
        "  ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "<<",
        "!!int ",
        "'",
        '"',
        "|\n",
        "#",
        "?",
        ",",
        "0x",
        "---\n",
    ]
)
WORDS = st.sampled_from(
    ["trust_domain", "workloads", "name", "sds", "mode", "null", "yes", "1", "1:2", "2001-01-01", "."]
)
ALMOST_YAML = st.lists(FRAGMENTS | WORDS, max_size=30).map("".join).map(str.encode)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary(max_size=60) | ALMOST_YAML | st.text(max_size=40).map(lambda text: MINIMAL.encode() + text.encode()))
def test_no_file_brings_the_reader_down(tmp_path: Path, content: bytes) -> None:
    for each in problems(tmp_path, content):
        assert "\n" not in str(each)
        assert each.fix


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.lists(st.sampled_from(["sds", "workloads", "0", "1", "name", "", "mode", "authorities", "x"]), max_size=4)
        .map("__".join)
        .map("SDS_AGENT__{}".format),
        st.text(max_size=10),
        max_size=5,
    )
)
def test_no_variable_brings_the_reader_down(tmp_path: Path, environ: dict[str, str]) -> None:
    for each in problems(tmp_path, MINIMAL, **environ):
        assert "\n" not in str(each)
        assert each.fix


@pytest.mark.parametrize("address", ["0.0.0.0:9902", "[::]:9902", "192.0.2.1:9902", "agent.example:9902"])
def test_an_admin_address_that_other_machines_reach_needs_the_explicit_word(tmp_path: Path, address: str) -> None:
    (found,) = problems(tmp_path, f"{MINIMAL}admin: {{address: '{address}'}}\n")
    assert (found.key, found.line) == ("admin.address", 5)
    assert "admin.beyond_loopback: true" in found.fix
    assert problems(tmp_path, f"{MINIMAL}admin: {{address: '{address}', beyond_loopback: true}}\n") == ()


@pytest.mark.parametrize("address", ["127.0.0.1:9902", "[::1]:0", "localhost:9902", "127.9.9.9:1"])
def test_loopback_needs_no_word(tmp_path: Path, address: str) -> None:
    assert problems(tmp_path, f"{MINIMAL}admin: {{address: '{address}'}}\n") == ()


@pytest.mark.parametrize(
    "host", [".example", "a..example", "a" * 64, "\u00e9" * 60, "a b", "a\\0b", "a\\nb", "[::1]x", "a\\u00a0b"]
)
def test_an_address_that_cannot_be_looked_up_is_refused_before_anything_listens(tmp_path: Path, host: str) -> None:
    (found,) = problems(tmp_path, f'{MINIMAL}admin: {{beyond_loopback: true, address: "{host}:9902"}}\n')
    assert (found.key, found.line) == ("admin.address", 5)
    assert "brackets" in found.fix or "a name has 1 to 63 characters" in found.fix


@pytest.mark.parametrize("host", ["agent.example.", "bücher.example", "a" * 63, "_x-1", "[fe80::1%eth0]"])
def test_an_address_of_any_other_name_is_taken(tmp_path: Path, host: str) -> None:
    assert problems(tmp_path, f'{MINIMAL}admin: {{beyond_loopback: true, address: "{host}:9902"}}\n') == ()
