"""The configuration that is pasted: whatever the words in it, YAML reads back what was meant."""

from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.envoy_config.commented import COMMENTS, written

NAMES = st.one_of(st.sampled_from(sorted(COMMENTS)), st.text(min_size=1, max_size=8))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.booleans(), st.integers(-5, 99_999), st.text(max_size=12), st.sampled_from(["on", "null", "1s", "- a"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=12,
)


def flat(value: Any) -> Any:
    """Without lists that stand directly in lists, which no message has."""
    match value:
        case list():
            return [flat(each) for each in value if not isinstance(each, list)]
        case dict():
            return {key: flat(each) for key, each in value.items()}
        case _:
            return value


@given(st.dictionaries(NAMES, VALUES.map(flat), min_size=1, max_size=4))
def test_it_reads_back_as_what_was_meant(value: dict[str, Any]) -> None:
    assert yaml.safe_load(written(value)) == value


def test_each_comment_is_above_the_first_of_its_keys() -> None:
    text = written({"a": [{"pipe": {"path": "/x"}}, {"pipe": {"path": "/y"}}]})
    assert text == f'a:\n  # {COMMENTS["pipe"]}\n  - pipe:\n      path: "/x"\n  - pipe:\n      path: "/y"\n'


def test_a_comment_can_be_of_one_of_the_places_of_a_key() -> None:
    text = written({"match": {"prefix": "/"}, "matcher": {"prefix": "a\nb"}})
    assert text == f'match:\n  prefix: "/"\nmatcher:\n  # {COMMENTS["matcher.prefix"]}\n  prefix: "a\\nb"\n'
