"""What may be done for those who ask without end, and what is said of the rest."""

from sds_agent.budget import Bucket, Buckets, Budget, Rate


def budget(each: float = 3, together: float = 5, *, most_keys: int = 100) -> Budget:
    """A budget that fills by one a second for each key and by two for all."""
    return Budget(Rate(each, 1), Rate(together, 2), most_keys=most_keys, count_every=60)


def granted(of: Budget, key: str, times: int, now: float) -> int:
    return sum(of.take(key, now) for _ in range(times))


def test_each_key_has_its_burst_and_then_its_rate() -> None:
    one = budget(together=1000)
    assert granted(one, "a", 10, 0) == 3
    assert granted(one, "a", 10, 0.9) == 0
    assert granted(one, "a", 10, 1) == 1
    assert granted(one, "a", 10, 10_000) == 3, "what is not used does not add up"
    assert granted(one, "b", 10, 10_000) == 3


def test_all_keys_together_have_no_more_than_the_common_rate() -> None:
    one = budget()
    assert [granted(one, f"key {number}", 10, 0) for number in range(4)] == [3, 2, 0, 0]
    assert [granted(one, f"key {number}", 10, 1) for number in range(4)] == [1, 1, 0, 0]


def test_a_key_that_asks_all_the_time_takes_nothing_that_others_could_have() -> None:
    one = budget()
    assert granted(one, "loud", 100_000, 0) == 3
    assert granted(one, "quiet", 2, 0) == 2


def test_a_costly_request_takes_its_cost_of_both_budgets_or_nothing() -> None:
    one = budget(each=10, together=10)
    assert not one.take("a", 0, cost=11)
    assert one.take("a", 0, cost=8)
    assert not one.take("a", 0, cost=3)
    assert granted(one, "b", 10, 0) == 2
    assert granted(one, "a", 10, 0.5) == 1


def test_a_caller_that_overdraws_learns_how_long_to_wait() -> None:
    bucket = Bucket(Rate(10, 2), 0)
    assert [bucket.overdraw(0, cost) for cost in (4, 6, 4, 1)] == [0, 0, 2, 2.5]
    assert bucket.overdraw(1.5, 2) == 2
    assert bucket.overdraw(100, 10) == 0


def test_a_key_that_is_forgotten_holds_no_memory() -> None:
    buckets = Buckets(Rate(1, 0), most=10)
    assert buckets.take("a", 0)
    buckets.forget("a")
    buckets.forget("never seen")
    assert len(buckets) == 0


def test_a_key_pays_nothing_for_what_the_common_bucket_refused() -> None:
    one = budget(each=3, together=1)
    assert granted(one, "a", 1, 0) == 1
    assert granted(one, "b", 100, 0) == 0
    assert granted(one, "b", 1, 0.5) == granted(one, "b", 1, 1) == granted(one, "b", 1, 1.5) == 1


def test_a_clock_that_is_set_back_gives_nothing_and_goes_on_from_there() -> None:
    buckets = Buckets(Rate(1, 1), most=10)
    assert buckets.take("a", 1000)
    assert not buckets.take("a", 10)
    assert buckets.take("a", 11)


def test_keys_without_end_cannot_grow_memory_and_who_goes_on_is_not_forgotten() -> None:
    buckets = Buckets(Rate(1, 0), most=3)
    assert buckets.take("steady", 0)
    for number in range(1000):
        buckets.take(f"{number}", 0)
        assert not buckets.take("steady", 0)
    assert len(buckets) == 3
    assert buckets.take("0", 0), "who was forgotten begins anew"


def test_the_first_omission_is_counted_at_once_and_the_next_once_an_interval() -> None:
    one = budget()
    assert one.left_out(0) == 0
    assert granted(one, "a", 4, 0) == 3
    assert one.left_out(0) == 1
    granted(one, "a", 10, 0)
    assert one.left_out(59.9) == 0
    assert one.left_out(60) == 10
    assert one.left_out(200) == 0


def test_an_omission_after_a_quiet_time_is_counted_at_once() -> None:
    one = budget()
    for begin in (0, 1000):
        granted(one, "a", 4, begin)
        assert one.left_out(begin) == 1


def test_every_omission_is_counted_at_the_end() -> None:
    one = budget()
    granted(one, "a", 4, 0)
    one.left_out(0)
    granted(one, "a", 5, 0)
    assert one.left_out(1, at_the_end=True) == 5
    assert one.left_out(1, at_the_end=True) == 0


def test_a_count_does_not_wait_for_a_clock_that_was_set_back() -> None:
    one = budget()
    granted(one, "a", 4, 1_000_000)
    one.left_out(1_000_000)
    granted(one, "a", 10, 5)
    assert one.left_out(5) == 10
