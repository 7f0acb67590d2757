"""None of many may take what the others need."""

from sds_agent.sds.shares import Shares


def filled(most: int, **holders: int) -> Shares[str]:
    """Each holder's members, named after it, one holder after the other."""
    shares = Shares[str](most)
    for holder, count in holders.items():
        for number in range(count):
            assert shares.enter(f"{holder}{number}", holder) is None
    return shares


def test_while_there_is_room_nobody_gives_way() -> None:
    assert len(filled(10, a=7, b=3)) == 10


def test_the_oldest_of_who_has_most_gives_way_to_a_new_one() -> None:
    shares = filled(10, a=7, b=3)
    assert shares.enter("new", "c") == "a0"
    shares.leave("a0")
    assert shares.enter("b3", "b") == "a1"


def test_who_has_most_gets_no_more_and_keeps_what_it_has() -> None:
    shares = filled(10, a=7, b=3)
    assert shares.enter("a7", "a") == "a7"
    shares.leave("a7")
    assert len(shares) == 10


def test_where_all_have_alike_the_new_one_gives_way() -> None:
    shares = filled(3, a=1, b=1, c=1)
    assert shares.enter("a1", "a") == "a1"


def test_one_that_leaves_twice_or_was_never_here_is_none_the_less() -> None:
    shares = filled(3, a=2)
    shares.leave("a0")
    shares.leave("a0")
    shares.leave("x")
    assert len(shares) == 1
    assert shares.enter("a2", "a") is None
