"""What screen readers are told: each file alone by name, of many the first and then how many."""

from __future__ import annotations

from ui.announcements import Announcements
from ui.client import Options
from ui.strings import TABLES, Strings
from ui.work import State, Task

ENGLISH = TABLES["en"]


def tasks(*names: str) -> list[Task]:
    return [Task(name, None, Options()) for name in names]


def said(announcements: Announcements, of: list[Task]) -> str | None:
    """What is new."""
    before = announcements.number
    announcements.look(of, Strings())
    assert announcements.number in (before, before + 1)
    return announcements.text if announcements.number > before else None


def ready(name: str) -> str:
    return ENGLISH["result.ready"].format(name=name)


def ready_of(count: int, total: int) -> str:
    return ENGLISH["result.ready_of"].format(ready=count, total=total)


def test_one_file_is_said_once_and_by_name() -> None:
    announcements, (task,) = Announcements(), tasks("a.wav")
    assert said(announcements, [task]) is None
    task.state = State.DONE
    assert said(announcements, [task]) == ready("a.wav")
    assert said(announcements, [task]) is None


def test_the_same_words_are_said_of_a_second_attempt() -> None:
    announcements, (task,) = Announcements(), tasks("a.wav")
    task.state = State.DONE
    assert said(announcements, [task]) == ready("a.wav")
    task.attempt += 1
    assert said(announcements, [task]) == ready("a.wav")
    again = Task("a.wav", None, Options(), state=State.DONE)
    assert said(announcements, [task, again]) == ready("a.wav")


def test_of_many_files_the_first_is_said_and_then_how_many() -> None:
    announcements, drop = Announcements(), tasks("a.wav", "b.wav", "c.wav", "d.wav")
    drop[1].state = State.DONE
    assert said(announcements, drop) == ready("b.wav")
    drop[0].state = State.DONE
    assert said(announcements, drop) is None
    drop[2].state = State.FAILED
    assert said(announcements, drop) is None
    drop[3].state = State.DONE
    assert said(announcements, drop) == ready_of(3, 4)
    assert said(announcements, drop) is None


def test_many_files_that_are_over_at_once_are_counted() -> None:
    announcements, drop = Announcements(), tasks("a.wav", "b.wav")
    for task in drop:
        task.state = State.DONE
    assert said(announcements, drop) == ready_of(2, 2)
    alone = Task("c.wav", None, Options(), state=State.DONE)
    assert said(announcements, [*drop, alone]) == ready("c.wav"), "the others are past"


def test_what_was_cancelled_is_not_counted() -> None:
    announcements, drop = Announcements(), tasks("a.wav", "b.wav", "c.wav")
    drop[0].state = State.CANCELLED
    assert said(announcements, drop) is None
    drop[1].state = drop[2].state = State.DONE
    assert said(announcements, drop) == ready_of(2, 2)


def test_failures_are_left_to_their_boxes() -> None:
    announcements, drop = Announcements(), tasks("a.wav", "b.wav")
    drop[0].state, drop[1].state = State.FAILED, State.CANCELLED
    assert said(announcements, drop) is None
