"""YAML with a comment above each key that a person could wonder about: pure."""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

COMMENTS: Mapping[str, str] = {  # by a key, or by the key above it and a key
    "node": "The agent's log and its status name this Envoy by its id.",
    "admin": "Envoy's own page, for `sds-agent secret --envoy http://127.0.0.1:9901`.",
    "require_client_certificate": "Without this line Envoy asks callers for no certificate.",
    "tls_minimum_protocol_version": "No TLS 1.2.",
    "tls_maximum_protocol_version": "An Envoy that calls others stays at TLS 1.2 without this line.",
    "ecdh_curves": "A key exchange that a quantum computer does not break, and others for peers that lack it.",
    "tls_certificate_sds_secret_configs": "The workload's certificate and key, by the name that the agent serves.",
    "initial_fetch_timeout": "Wait, however long the CA takes. By default Envoy goes on without after 15 s and resets "
    "every connection.",
    "set_node_on_first_message_only": "Without this line each ACK repeats 60 KB about this Envoy.",
    "retry_policy": "Connect to the agent again within 2 s; without it, within 30 s.",
    "match_typed_subject_alt_names": "Who is accepted. Without a match every certificate of the CA is.",
    "matcher.prefix": "This accepts every workload of the trust domain; `--peer SPIFFE-ID` names those you expect.",
    "validation_context_sds_secret_config": "The roots, by the name that the agent serves.",
    "path_config_source": "Envoy reads the secret's files by itself, as this file names them.",
    "watched_directory": "Envoy reads the files again when this directory's link is replaced.",
    "disable_stateless_session_resumption": "A resumed session shows no certificate: one that has expired goes on.",
    "max_session_keys": "No session to others is resumed: one would go on with a certificate that has expired.",
    "http2_protocol_options": "gRPC needs HTTP/2.",
    "pipe": "The agent's socket; the group of sds.group may connect.",
    "direct_response": "Put `route: {cluster: ...}` of your server here.",
}


def written(value: Mapping[str, Any]) -> str:
    """The value as YAML, each comment above the first of its keys."""
    return "\n".join(_mapping(value, "", "", set())) + "\n"


def _mapping(value: Mapping[str, Any], above: str, indent: str, said: set[str]) -> Iterator[str]:
    for key, inner in value.items():
        for place in (f"{above}.{key}", key):
            if place in COMMENTS and place not in said:
                said.add(place)
                yield f"{indent}# {COMMENTS[place]}"
        yield from _entry(key, inner, indent, said)


def _entry(key: str, value: object, indent: str, said: set[str]) -> Iterator[str]:
    start = f"{indent}{_scalar(key)}:"
    match value:
        case dict() if value:
            yield start
            yield from _mapping(value, key, f"{indent}  ", said)
        case list() if value:
            yield start
            for item in value:
                yield from _item(item, key, f"{indent}  ", said)
        case dict():
            yield f"{start} {{}}"
        case list():
            yield f"{start} []"
        case _:
            yield f"{start} {_scalar(value)}"


def _item(item: object, above: str, indent: str, said: set[str]) -> Iterator[str]:
    if not isinstance(item, dict) or not item:
        yield f"{indent}- {_scalar(item) if not isinstance(item, dict) else '{}'}"
        return
    lines = list(_mapping(item, above, f"{indent}  ", said))
    comments = list(takewhile(lambda line: line.lstrip().startswith("# "), lines))
    yield from (f"{indent}{line.strip()}" for line in comments)
    first, *rest = lines[len(comments) :]
    yield f"{indent}- {first.strip()}"
    yield from rest


def _scalar(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case str() if (
            value.isascii() and value and value[0].isalpha() and all(c.isalnum() or c in "_-./" for c in value)
        ):
            return value if value.lower() not in _WORDS else _quoted(value)
        case _:
            return _quoted(str(value))


def _quoted(text: str) -> str:
    """The text in double quotes, in ASCII (YAML 1.2.2 section 5.7)."""
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isascii() and character.isprintable() else f"\\U{ord(character):08x}"


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
"""Words that YAML 1.1 reads as something else than text, in lower case."""
