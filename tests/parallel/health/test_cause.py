"""Who failed first, and who keeps the others waiting."""

from __future__ import annotations

from hearth.parallel.health.cause import Death, blame, first_death, last_lines

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3341"
COLLECTIVE = 'File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3029 in all_reduce'
BACKWARD = 'File "/x/site-packages/torch/autograd/graph.py", line 841 in _engine_run_backward'
LOADING = 'File "/home/me/rewards.py", line 12 in score'


def test_the_first_to_die_is_named() -> None:
    assert first_death([Death(1, 5.0, 1, "b"), Death(0, 4.9, 1, "a")]).rank == 0


def test_who_only_lost_a_connection_is_not_blamed() -> None:
    # Rank 1 is slow to write its traceback; rank 0 has ended before.
    assert first_death([Death(0, 1.0, 1, LOST), Death(1, 1.2, 1, "ValueError: no number")]).rank == 1
    assert first_death([Death(0, 1.0, 1, LOST), Death(1, 1.1, -9, "")]).rank == 1
    gave_up = "rank 0 of 2 lost a process in step 14 of 40: Timed out waiting 15000ms for send operation"
    assert first_death([Death(0, 1.0, 1, gave_up), Death(1, 1.1, 1, "MemoryError")]).rank == 1
    # Where all have lost the connection, a network failed, and the first is as good as any.
    assert first_death([Death(0, 1.0, 1, LOST), Death(1, 0.9, 1, LOST)]).rank == 1


def test_who_does_not_answer_or_does_not_wait_keeps_the_others_waiting() -> None:
    assert blame([0, 1, 2], [2], [1, 2], {0: COLLECTIVE}) == [2]
    assert blame([0, 1, 2], [], [1], {0: COLLECTIVE, 2: COLLECTIVE}) == [1]
    assert blame([0, 1, 2], [], [], {0: COLLECTIVE, 1: LOADING, 2: BACKWARD}) == [1]
    assert blame([0, 1], [], [], {0: COLLECTIVE, 1: BACKWARD}) == [0, 1]


def test_last_lines_leave_blanks_out() -> None:
    assert last_lines("a\n\nb\n \nc\n", 2) == "b\nc"
    assert last_lines("") == ""
