"""FetchSecrets: what one question is answered, and when it is worth waiting."""

import pytest
from fakes.served import Served

from sds_agent.sds.fetch import fetch
from sds_agent.sds.protocol import Finish, Respond, SotwRequest, StatusCode


def ask(*names: str, most_names: int = 100, type_url: str = "") -> Respond | Finish | None:
    served = Served()
    served.put("default", "v1")
    served.put("ROOTCA", "r1")
    served.hold("late")
    served.hold("later")
    return fetch(SotwRequest(names=names, type_url=type_url), served, most_names=most_names)


def given(answer: Respond | Finish | None) -> list[str]:
    assert isinstance(answer, Respond)
    assert answer.nonce == ""
    assert answer.removed == ()
    return [resource.name for resource in answer.resources]


def test_known_names_are_answered_each_once() -> None:
    assert given(ask("default", "ROOTCA", "default")) == ["default", "ROOTCA"]


def test_unknown_names_among_known_ones_are_left_out() -> None:
    assert given(ask("nobody", "default")) == ["default"]


@pytest.mark.parametrize("names", [("late",), ("late", "later"), ("default", "late"), ("nobody", "late")])
def test_a_name_that_is_not_issued_yet_is_waited_for(names: tuple[str, ...]) -> None:
    """An answer without it would look complete."""
    assert ask(*names) is None


@pytest.mark.parametrize("names", [("nobody",), ("nobody", "*")])
def test_unknown_names_alone_are_not_found(names: tuple[str, ...]) -> None:
    assert ask(*names) == Finish(StatusCode.NOT_FOUND, names)


def test_no_name_is_no_wildcard() -> None:
    answer = ask()
    assert isinstance(answer, Finish)
    assert answer.code is StatusCode.INVALID_ARGUMENT


def test_another_type_is_refused() -> None:
    answer = ask("default", type_url="type.googleapis.com/x.Cluster")
    assert isinstance(answer, Finish)
    assert answer.code is StatusCode.INVALID_ARGUMENT


def test_too_many_names_are_refused() -> None:
    assert given(ask("default", "default", "ROOTCA", most_names=2)) == ["default", "ROOTCA"]
    answer = ask("default", "ROOTCA", "nobody", most_names=2)
    assert isinstance(answer, Finish)
    assert answer.code is StatusCode.RESOURCE_EXHAUSTED
