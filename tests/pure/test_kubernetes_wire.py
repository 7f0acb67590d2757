"""What an API server says of a refusal, as a message."""

import msgspec
from fakes.hierarchy import NOW

from sds_agent.authority.http_client import HttpAnswer
from sds_agent.authority.kubernetes.wire import MOST_CAUSES, ApiResource, read_status, refusal

RESOURCE = ApiResource("certificates.k8s.io", "v1", "certificatesigningrequests", "CertificateSigningRequest")


def test_of_a_flood_of_causes_the_first_are_read() -> None:
    """Each is looked for in the message: with a million of both the agent would do nothing else for minutes."""
    causes = [{"field": "f", "message": str(number)} for number in range(MOST_CAUSES + 1)]
    said = read_status(msgspec.json.encode({"message": "no", "details": {"causes": causes}})).words()
    assert said == "; ".join(["no", *(f"f: {number}" for number in range(MOST_CAUSES))])


def test_a_reason_is_as_short_and_plain_as_all_other_words() -> None:
    body = msgspec.json.encode({"reason": "x\x1b\n" * 100_000, "message": "no"})
    error = refusal(HttpAnswer(422, {}, body, "api.example"), RESOURCE, "create", "the API server", NOW)
    assert len(str(error)) < 1000
    assert str(error).isprintable()
