"""SPIFFE IDs: a wrong one in the configuration is an error that says why, and a CA is never asked for one."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.errors import SdsAgentError
from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError, TrustDomain

# Sections 2.1 to 2.3 of the SPIFFE-ID standard, written down apart from the code as one expression.
STANDARD = re.compile(
    r"(?=.{0,2048}\Z)spiffe://([a-z0-9.\-_]{1,255})((?:/(?!\.{1,2}(?:/|\Z))[a-zA-Z0-9.\-_]+)*)", re.ASCII | re.DOTALL
)

NAMES = st.text(alphabet="abcz019.-_", min_size=1, max_size=255)
SEGMENTS = st.text(alphabet="abzABZ019.-_", min_size=1, max_size=40).filter(lambda s: s not in {".", ".."})
PATHS = st.lists(SEGMENTS, max_size=6).map(lambda segments: "".join(f"/{s}" for s in segments))
# texts that come close: the right pieces and the wrong ones in any order
RIGHT_PIECES = ["spiffe://", "/", "td", "a.b", "Web", "-", "_", "...", "0", "a" * 254, "b" * 2000]
WRONG_PIECES = ["SPIFFE://", "spiffe:", "//", "/..", "/./", "%41", "%", "?", "#", "@", ":80", "[", "~", " "]
ODD_PIECES = ["é", "ſ", "\n", "\x00", "\ud800", "\u2028"]
PIECES = st.sampled_from([*RIGHT_PIECES, *RIGHT_PIECES, *WRONG_PIECES, *ODD_PIECES])
NEARLY = st.lists(PIECES, max_size=8).map("".join) | st.lists(PIECES, max_size=7).map(
    lambda p: "spiffe://td" + "".join(p)
)


def test_an_id_is_its_trust_domain_and_its_path() -> None:
    identity = SpiffeId.parse("spiffe://demo.example/ns/default/sa/Web_1.0-x")
    assert identity.trust_domain == TrustDomain("demo.example")
    assert identity.path == "/ns/default/sa/Web_1.0-x"
    assert str(identity) == "spiffe://demo.example/ns/default/sa/Web_1.0-x"
    assert identity.is_workload


def test_a_trust_domain_is_known_by_its_name_and_by_its_own_id() -> None:
    domain = TrustDomain.parse("demo.example")
    assert (str(domain), domain.uri) == ("demo.example", "spiffe://demo.example")
    own = SpiffeId.parse(domain.uri)
    assert own == SpiffeId(domain, "")
    assert not own.is_workload


@pytest.mark.parametrize("text", ["spiffe://A", "spiffe://td/%", "spiffe://td//", "SPIFFE://td/", "x"])
def test_a_text_too_long_for_an_id_is_refused_before_it_is_parsed(text: str) -> None:
    """A peer may send megabytes in the place of an ID, and the time to parse them is lost to every other peer."""
    with pytest.raises(SpiffeIdError, match="bytes long"):
        SpiffeId.parse(text + "A" * 4_000_000)
    with pytest.raises(SpiffeIdError, match="bytes long"):
        TrustDomain.parse("A" * 4_000_000)


@given(name=NAMES, path=PATHS)
def test_every_id_of_the_standard_is_taken_and_written_back_as_it_was(name: str, path: str) -> None:
    uri = f"spiffe://{name}{path}"
    identity = SpiffeId.parse(uri)
    assert (str(identity), str(identity.trust_domain), identity.path) == (uri, name, path)
    assert identity == SpiffeId(TrustDomain(name), path)


@given(text=st.one_of(NEARLY, st.text(), st.from_regex(STANDARD, fullmatch=True)))
def test_a_text_is_an_id_exactly_if_the_standard_says_so(text: str) -> None:
    expected = STANDARD.fullmatch(text)
    try:
        identity = SpiffeId.parse(text)
    except SpiffeIdError:
        assert expected is None
    else:
        assert expected is not None
        assert (identity.trust_domain.name, identity.path) == expected.groups()


@given(text=st.one_of(NEARLY, st.text()))
def test_a_refusal_is_one_short_line_of_ascii(text: str) -> None:
    """However long or odd the text, the message can stand in a log or on a terminal."""
    for parse in (SpiffeId.parse, TrustDomain.parse):
        try:
            parse(text)
        except SpiffeIdError as error:
            message = str(error)
            assert message.isascii()
            assert message.isprintable()
            # 80 characters of the text, each at most ten when escaped, and our own words
            assert len(message) < 80 * 10 + 200


WRONG = [
    ("", "it must begin with spiffe://"),
    ("https://demo.example/web", "it must begin with spiffe://"),
    (" spiffe://demo.example/web", "it must begin with spiffe://"),
    ("spiffe:/demo.example/web", "it must begin with spiffe://"),
    ("SPIFFE://demo.example/web", "must be in lower case: write spiffe://"),
    ("spiffe://", "the trust domain is empty"),
    ("spiffe:///web", "the trust domain is empty"),
    ("spiffe://Demo.example/web", "'D' (write it in lower case)"),
    ("spiffe://demo.example:8080/web", "':' (a SPIFFE ID has no port)"),
    ("spiffe://user@demo.example/web", "'@' (a SPIFFE ID has no user part)"),
    ("spiffe://d%65mo.example/web", "'%' (a SPIFFE ID has no percent-encoding)"),
    ("spiffe://demo.example?web", "'?' (a SPIFFE ID has no query)"),
    ("spiffe://[::1]/web", "holds '['; allowed are a-z, 0-9"),
    ("spiffe://" + "a" * 256 + "/web", "is 256 bytes long, and the most that is allowed is 255"),
    ("spiffe://demo.example/", "ends with '/'"),
    ("spiffe://demo.example/web/", "ends with '/'"),
    ("spiffe://demo.example//web", "has an empty segment"),
    ("spiffe://demo.example/./web", "has the segment '.'"),
    ("spiffe://demo.example/ns/..", "has the segment '..'"),
    ("spiffe://demo.example/w%65b", "'%' (a SPIFFE ID has no percent-encoding)"),
    ("spiffe://demo.example/web?x=1", "'?' (a SPIFFE ID has no query)"),
    ("spiffe://demo.example/web#x", "'#' (a SPIFFE ID has no fragment)"),
    ("spiffe://demo.example/w b", "holds ' '; allowed between two '/' are a-z, A-Z"),
    ("spiffe://demo.example/web\n", r"holds '\n'"),
    ("spiffe://demo.example/" + "a" * 2027, "is 2049 bytes long, and the most that is allowed is 2048"),
]


@pytest.mark.parametrize(("text", "reason"), WRONG)
def test_the_message_names_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(SpiffeIdError) as refused:
        SpiffeId.parse(text)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the trust domain is empty"),
        ("spiffe://demo.example", "must be the bare name, without spiffe://"),
        ("demo.example/web", "holds '/'"),
        ("Demo.example", "'D' (write it in lower case)"),
    ],
)
def test_a_trust_domain_is_configured_by_its_bare_name(text: str, reason: str) -> None:
    with pytest.raises(SpiffeIdError) as refused:
        TrustDomain.parse(text)
    assert reason in str(refused.value)


def test_the_longest_names_are_taken() -> None:
    assert TrustDomain.parse("a" * 255).name == "a" * 255
    assert len(str(SpiffeId.parse("spiffe://demo.example/" + "a" * 2026))) == 2048


def test_an_id_cannot_be_put_together_wrong() -> None:
    """Code that gets a SpiffeId need not check it again, however it was made."""
    domain = TrustDomain("demo.example")
    for path in ("web", "/", "/../x", "/" + "a" * 2048):
        with pytest.raises(SpiffeIdError):
            SpiffeId(domain, path)
    with pytest.raises(SpiffeIdError):
        TrustDomain("Demo")


def test_ids_sort_by_trust_domain_and_then_by_path() -> None:
    texts = ["spiffe://b/a", "spiffe://a/b", "spiffe://a/a", "spiffe://a"]
    assert [str(i) for i in sorted(map(SpiffeId.parse, texts))] == sorted(texts)


def test_the_error_is_one_of_ours() -> None:
    assert issubclass(SpiffeIdError, SdsAgentError)
