"""What a start leaves unloaded is there once it is used; each case is a process of its own, as imports stay."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.hierarchy import DAY, NOW

from sds_agent.deferral import EXPRESSIONS
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem
from sds_agent.signing.signer import make_root


def told(program: str, *arguments: str, **environ: str) -> object:
    """What the program prints, as JSON."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_asyncio_is_imported_without_tls_and_speaks_it_when_asked(tmp_path: Path) -> None:
    """An adapter for a CA may use asyncio's TLS: that must be as if nothing had been deferred."""
    signer = make_root(generate(KeyType.EC_P256), "demo.example", NOW, DAY)
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    files[0].write_bytes(write_pem([signer.certificate]))
    files[1].write_bytes(to_pkcs8_pem(signer.key))
    program = """
import json, sys
from sds_agent.deferral import deferred
with deferred():
    import asyncio
    import ssl
before = sorted({"_ssl", "_hashlib"} & set(sys.modules))

async def main():
    async def answer(reader, writer):
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(sys.argv[1], sys.argv[2])
    client_side = ssl.create_default_context()
    client_side.check_hostname, client_side.verify_mode = False, ssl.CERT_NONE
    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_side) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=client_side)
        writer.write(b"hello\\n")
        said = (await reader.readline()).decode().strip()
        writer.close()
        return said

print(json.dumps([before, asyncio.run(main())]))
"""
    assert told(program, *map(str, files)) == [[], "hello"]


def test_threads_that_ask_at_one_time_get_a_whole_module() -> None:
    program = """
import json, sys
from threading import Barrier, Thread
from sds_agent.deferral import deferred
with deferred():
    import hashlib
assert "_hashlib" not in sys.modules
together, found = Barrier(8), []

def ask():
    together.wait()
    found.append(hashlib.sha256(b"a").hexdigest()[:4])

threads = [Thread(target=ask) for _ in range(8)]
[each.start() for each in threads]
[each.join() for each in threads]
print(json.dumps([found == ["ca97"] * 8, type(hashlib).__name__, hasattr(hashlib, "nothing")]))
"""
    assert told(program) == [True, "module", False]


def test_a_module_that_cannot_be_loaded_says_why_each_time() -> None:
    program = """
import json, sys
from sds_agent.deferral import deferred
with deferred():
    import ssl
sys.modules["_ssl"] = None
said = []
for _ in range(2):
    try:
        ssl.SSLContext
    except ImportError as error:
        said.append(error.name)
del sys.modules["_ssl"]
print(json.dumps([said, ssl.SSLContext.__name__]))
"""
    assert told(program) == [["_ssl", "_ssl"], "SSLContext"]


def test_what_is_loaded_stays_so_and_later_imports_are_as_ever() -> None:
    program = """
import json, sys
import ssl
from sds_agent.deferral import deferred
with deferred():
    import ssl as again
    from hashlib import sha256
import hmac
print(json.dumps([again.SSLContext is ssl.SSLContext, type(hmac).__name__, sha256(b"a").hexdigest()[:4]]))
"""
    assert told(program) == [True, "module", "ca97"]


def test_a_traceback_in_the_log_shows_its_lines(tmp_path: Path) -> None:
    """It reads them with three modules that are left for that."""
    file = tmp_path / "failing.py"
    file.write_text("def fail():\n    raise ValueError('ä')\n", encoding="utf-8")
    program = """
import importlib.util, json, sys
from sds_agent.deferral import deferred
with deferred():
    import logging
before = sorted({"re", "textwrap", "tokenize"} & {each for each in sys.modules if type(sys.modules[each]) is type(sys)})
spec = importlib.util.spec_from_file_location("failing", sys.argv[1])
failing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(failing)
try:
    failing.fail()
except ValueError as error:
    record = logging.makeLogRecord({"exc_info": sys.exc_info()})
print(json.dumps([before, logging.Formatter().format(record).splitlines()[-2:]]))
"""
    assert told(program, str(file)) == [["re"], ["    raise ValueError('ä')", "ValueError: ä"]]


@pytest.mark.parametrize("implementation", ["upb", "python"])
def test_either_kind_of_protobuf_serves(implementation: str) -> None:
    program = """
import json
from sds_agent.deferral import deferred
with deferred():
    from sds_agent.sds.codec import decode
print(json.dumps(decode(b"\\x1a\\x01a").names))
"""
    assert told(program, PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=implementation) == ["a"]


def test_expressions_are_compiled_once_they_are_used_and_find_what_they_should() -> None:
    """They are of the libraries' own code: a name as text, say, and YAML where libyaml does not read it."""
    program = """
import json, re
from fakes.expressions import compiled_for
used_by = compiled_for()
from sds_agent.deferral import EXPRESSIONS, deferred
with deferred():
    import logging, platform, string, urllib.parse
    import yaml
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from email.utils import formataddr
imported = sorted(EXPRESSIONS & used_by)
try:
    load_ssh_public_key(b"key")
except ValueError as error:
    refused_key = str(error)
texts = [
    formataddr(("A. B", "a@b.example")),
    logging.Formatter("{message:>3}", style="{").format(logging.makeLogRecord({"msg": "a"})),
    string.Template("$a").substitute(a="b"),
    urllib.parse.unquote("%C3%A4"),
    platform.python_implementation(),
]
name = x509.Name.from_rfc4514_string(r"CN=a\\,b,O=x\\2Fy").rfc4514_string()
values = yaml.load("{a: 1.5, b: ~, c: off, d: word, e: 2026-01-01}", yaml.SafeLoader)
values["e"] = values["e"].year
try:
    refused = yaml.load("a: \\x01", yaml.SafeLoader)
except yaml.reader.ReaderError as error:
    refused = error.character
found = [imported, refused_key, texts, name, values, refused]
print(json.dumps([*found, sorted(EXPRESSIONS & used_by), re.compile.__module__]))
"""
    assert told(program) == [
        ["logging"],  # by the import, which checks its default format
        "Invalid line format",
        ['"A. B" <a@b.example>', "  a", "b", "ä", "CPython"],
        r"CN=a\,b,O=x/y",
        {"a": 1.5, "b": None, "c": False, "d": "word", "e": 2026},
        1,
        sorted(EXPRESSIONS),  # once all was used
        "re",
    ]
