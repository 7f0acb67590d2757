"""Words of others in a message of ours: bounded, on one line, and unable to pass for anything else."""

import ast
import json

from hypothesis import given
from hypothesis import strategies as st

from sds_agent.text import MARK, ascii_json, cut, escaped, one_line, printable, quoted, visible

ANY = st.text(max_size=60)
MOST = st.integers(1, 50)


@given(ANY, MOST)
def test_a_text_is_whole_or_visibly_cut(text: str, most: int) -> None:
    assert cut(text, most) == (text if len(text) <= most else text[:most] + MARK)
    counted = cut(text, most, count=True)
    assert counted == text or counted == f"{text[:most]}… ({len(text)} characters)"


@given(ANY, MOST)
def test_a_quoted_text_can_be_read_back_and_shows_where_it_was_cut(text: str, most: int) -> None:
    shown = quoted(text, most)
    assert shown.isascii()
    assert shown.isprintable()
    if len(text) <= most:
        assert ast.literal_eval(shown) == text
    else:
        assert ast.literal_eval(shown.removesuffix(MARK)) == text[:most], "the mark is not a part of the text"


@given(ANY, MOST)
def test_another_programs_words_stay_on_one_bounded_line(text: str, most: int) -> None:
    for shown in (one_line(text, most), escaped(text, most)):
        assert shown.isascii()
        assert shown.isprintable()
        assert len(shown) <= most + len(MARK)


@given(st.one_of(ANY, st.dictionaries(ANY, ANY, max_size=2)))
def test_json_is_ascii_and_says_the_same(value: object) -> None:
    shown = ascii_json(value)
    assert shown.isascii()
    assert shown.isprintable()
    assert json.loads(shown) == value


def test_a_text_that_no_encoding_takes_is_shown_too() -> None:
    assert json.loads(ascii_json("\udcff")) == "\udcff"


@given(ANY | st.just("\x7f"))
def test_no_text_in_json_or_a_status_tells_a_terminal_anything(text: str) -> None:
    assert ascii_json(text).isprintable()
    assert json.loads(ascii_json(text)) == text
    assert printable(text, 100).isprintable()


@given(ANY)
def test_letters_of_every_script_stay_and_nothing_else_acts_on_the_terminal(text: str) -> None:
    assert visible(text).isprintable()
    assert visible(text) == text or not text.isprintable()
