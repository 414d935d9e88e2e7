"""Timing alternates, and its verdict is worded by the ratio. No clock is asserted on."""

from edgepass.speed import Speed, compare


def test_both_sides_run_equally_often_and_alternate():
    calls = []
    speed = compare(lambda: calls.append("a"), lambda: calls.append("b"), budget_s=0)
    assert speed.rounds == 3
    assert calls == ["a", "b", *"abbaab"]


def test_wording():
    assert "2.00x faster (measured" in str(Speed(2.0, 1.0, 2.0, 5))
    assert "1.25x slower" in str(Speed(1.0, 1.25, 0.8, 5))
    assert Speed(1.0, 1.25, 0.8, 5).slower
    assert not Speed(1.0, 1.01, 0.99, 5).slower
