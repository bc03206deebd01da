from revivemoe.core.pace import ASK_AGAIN, FIRST, GENTLE, LEAST, USUAL, Pace


def learnt(decodes_s: float, token_s: float, steps: int = 60) -> Pace:
    pace = Pace()
    for step in range(steps):
        prefill = 40 if step % 3 == 0 else 0
        pace.note(prefill, 8, decodes_s + prefill * token_s)
    return pace


def test_before_anything_is_known():
    assert Pace().prefill_tokens(USUAL, 512) == FIRST
    assert Pace().prefill_tokens(USUAL, 20) == 20


def test_a_step_takes_so_many_times_as_long_as_decodes():
    pace = learnt(0.05, 0.001)
    assert abs(pace.prefill_tokens(GENTLE, 512) - 50) <= 1
    assert abs(pace.prefill_tokens(USUAL, 512) - 350) <= 3
    assert pace.prefill_tokens(USUAL, 100) == 100


def test_a_prefill_always_gets_on():
    assert learnt(0.001, 0.1).prefill_tokens(GENTLE, 512) == LEAST
    assert learnt(0.001, 0.1).prefill_tokens(GENTLE, 4) == 4


def test_tokens_that_cost_nothing_are_bounded_by_the_step():
    assert learnt(0.05, 0.0).prefill_tokens(GENTLE, 512) == 512


def test_a_prefill_alone_tells_what_a_token_costs():
    pace = Pace()
    pace.note(200, 0, 0.2)
    pace.note(0, 4, 0.05)
    assert abs(pace.prefill_tokens(GENTLE, 512) - 50) <= 1
    pace.note(0, 0, 9.0)  # it only served others
    pace.note(3, 0, 9.0)  # too few to tell anything
    assert abs(pace.prefill_tokens(GENTLE, 512) - 50) <= 1


def test_it_follows_what_has_changed():
    pace = learnt(0.05, 0.001)
    for _ in range(40):
        pace.note(0, 8, 0.1)
        pace.note(40, 8, 0.1 + 40 * 0.004)
    assert abs(pace.prefill_tokens(GENTLE, 512) - 25) <= 2


def test_decodes_are_looked_at_again_where_a_prefill_never_ends():
    """Many streams are decoded by now: what they cost must not be put down to prompt tokens."""
    pace, seen = learnt(0.01, 0.001), []
    for _ in range(400):
        tokens = pace.prefill_tokens(USUAL, 512)
        pace.note(tokens, 64, 0.1 + tokens * 0.001)
        seen.append(tokens)
    assert seen.count(1) >= 400 // ASK_AGAIN - 1
    assert seen[-2] == 512
    fresh = Pace()
    for _ in range(400):
        tokens = fresh.prefill_tokens(USUAL, 512)
        fresh.note(tokens, 8, 0.05 + tokens * 0.001)
    assert fresh.prefill_tokens(USUAL, 512) > FIRST, "it has never seen a step of decodes alone"


def test_two_that_prefill_do_not_wait_for_each_other():
    """To see a step of decodes alone; neither would ever come to one."""
    pace = learnt(0.05, 0.001)
    for _ in range(2 * ASK_AGAIN):
        pace.note(40, 8, 0.09)
    assert pace.prefill_tokens(USUAL, 512) == 1
    pace.note_shared()
    assert pace.prefill_tokens(USUAL, 512) > FIRST
