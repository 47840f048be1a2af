"""Who is suspected of a step that failed, whose steps come next, and who is found guilty."""

from __future__ import annotations

import random

from common.node.suspects import UNEXPLAINED, Suspects


def test_nobody_is_suspected_and_all_are_computed_together() -> None:
    suspects = Suspects()
    suspects.passed("", {"a": 5, "b": 9})
    assert list(suspects.turns()) == [""]
    assert not suspects


def test_all_that_were_in_a_step_that_failed_are_tried_alone_and_the_others_go_on() -> None:
    suspects = Suspects()
    assert suspects.failed("", {"a": 5, "b": 9}) == ""
    assert list(suspects.turns()) == ["a", "b", ""], "a failed step was theirs"
    suspects.passed("a", {"a": 5})
    assert list(suspects) == ["b"]
    assert list(suspects.turns()) == ["", "b"], "in turns with all who are clear"


def test_a_suspect_is_clear_past_the_position_at_which_the_step_failed() -> None:
    suspects = Suspects()
    suspects.failed("", {"a": 40, "b": 9})
    suspects.passed("a", {"a": 16})
    assert list(suspects) == ["b", "a"], "the others are tried meanwhile"
    suspects.passed("a", {"a": 40})
    assert list(suspects) == ["b"]


def test_a_suspect_has_a_few_steps_in_a_row_and_then_all_who_are_clear() -> None:
    suspects = Suspects()
    suspects.failed("", {"a": 40, "b": 40})
    turns = []
    for _ in range(7):
        turn = next(suspects.turns())
        turns.append(turn)
        suspects.passed(turn, {turn: 1} if turn else {"c": 1, "d": 1})
    assert turns == ["a", "a", "", "b", "b", "", "a"]


def test_only_one_that_fails_alone_is_guilty() -> None:
    suspects = Suspects()
    suspects.failed("", {"a": 5, "b": 9})
    assert suspects.failed("b", {"b": 9}) == "b"
    assert list(suspects) == ["a"]


def test_a_request_that_is_the_only_one_there_is_tried_once_more() -> None:
    suspects = Suspects()
    assert suspects.failed("", {"a": 5}) == ""
    assert suspects.failed("a", {"a": 5}) == "a"


def test_one_that_a_gateway_suspects_is_guilty_at_its_first_failure() -> None:
    suspects = Suspects()
    suspects.suspect("a", 30)
    assert list(suspects.turns()) == ["a", ""]
    assert suspects.failed("a", {"a": 3}) == "a"


def test_one_that_has_ended_is_no_suspect() -> None:
    suspects = Suspects()
    suspects.failed("", {"a": 5})
    suspects.forget("a")
    suspects.forget("b")
    assert not suspects


def test_failures_that_nobody_is_guilty_of_are_the_engine_s() -> None:
    suspects = Suspects()
    for failure in range(1, UNEXPLAINED + 1):
        suspects.failed("", {"a": failure, "b": failure})
        assert suspects.unexplained == (failure == UNEXPLAINED)
        suspects.passed("a", {"a": failure})
        suspects.passed("b", {"b": failure})


def test_a_step_of_several_that_goes_well_or_a_culprit_clears_the_engine() -> None:
    for explained in (True, False):
        suspects = Suspects()
        for failure in range(1, 3 * UNEXPLAINED):
            suspects.failed("", {"a": failure, "b": failure})
            suspects.passed("a", {"a": failure})
            if explained:
                suspects.failed("b", {"b": failure})
            else:
                suspects.passed("b", {"b": failure})
                suspects.passed("", {"a": failure + 1, "b": failure + 1})
            assert not suspects.unexplained


def test_further_failures_while_suspects_are_tried_count_once() -> None:
    """Several poisons that come one after the other are found one after the other."""
    suspects = Suspects()
    suspects.failed("", {"poison 0": 5, "a": 5})
    for number in range(1, 3 * UNEXPLAINED):
        suspects.failed("", {f"poison {number}": 5, f"innocent {number}": 3})
    assert not suspects.unexplained
    assert list(suspects)[:3] == ["poison 0", "a", "poison 1"]


def test_whatever_comes_only_poison_is_found_guilty_and_all_of_it_is() -> None:
    chance = random.Random(4)
    for _ in range(300):
        suspects, guilty = Suspects(), set()
        poison = {name: chance.randrange(1, 9) for name in "abcdefgh" if chance.random() < 0.3}
        positions = dict.fromkeys("abcdefgh", 0)
        for _step in range(400):
            for alone in suspects.turns():
                members = [alone] if alone else [name for name in positions if name not in suspects]
                members = [name for name in members if alone or chance.random() < 0.8]
                if members:
                    break
            else:
                break
            assert not suspects.unexplained
            reached = {name: positions[name] + 1 for name in members}
            if any(poison.get(name) == reached[name] for name in members):
                if found := suspects.failed(alone, reached):
                    guilty.add(found)
                    del positions[found]
            else:
                suspects.passed(alone, reached)
                positions.update(reached)
                for name in [name for name in members if positions[name] == 10]:
                    del positions[name]
                    suspects.forget(name)
            if not positions:
                break
        assert guilty == set(poison)
