"""No group may take what the others need."""

from sds_agent.rpc.crowd import Crowd


def filled(most: int, **holders: int) -> Crowd[str]:
    """Each holder's members, named after it, one holder after the other."""
    crowd = Crowd[str]()
    for holder, count in holders.items():
        for number in range(count):
            assert crowd.admit(f"{holder}{number}", holder, most) is None
    return crowd


def test_while_there_is_room_no_member_gives_way() -> None:
    assert len(filled(10, a=7, b=3)) == 10


def test_the_oldest_of_the_largest_group_gives_way_to_a_new_member() -> None:
    crowd = filled(10, a=7, b=3)
    assert crowd.admit("new", "c", 10) == "a0"
    crowd.leave("a0")
    assert crowd.admit("b3", "b", 10) == "a1"


def test_the_largest_group_gets_no_more_and_keeps_its_members() -> None:
    crowd = filled(10, a=7, b=3)
    assert crowd.admit("a7", "a", 10) == "a7"
    crowd.leave("a7")
    assert len(crowd) == 10


def test_where_all_groups_are_alike_the_new_member_gives_way() -> None:
    crowd = filled(3, a=1, b=1, c=1)
    assert crowd.admit("a1", "a", 3) == "a1"


def test_a_member_that_leaves_twice_or_was_never_here_changes_nothing() -> None:
    crowd = filled(3, a=2)
    crowd.leave("a0")
    crowd.leave("a0")
    crowd.leave("x")
    assert len(crowd) == 1
    assert crowd.admit("a2", "a", 3) is None
