"""What there is to say of files that are over: their results appear while nobody touches the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ui.strings import Strings
from ui.work import State, Task


@dataclass
class Announcements:
    """``text`` is what was said last, ``number`` counts what has been said.

    Files that are on their way together are one round. Its first transcript is said by name, and at its end
    how many there are: to say each of fifty would drown whatever else the person listens to. Failures and
    "Cancelled" are not said here, because the boxes that show them are announced themselves.
    """

    text: str = ""
    number: int = 0
    _past: set[tuple[str, int]] = field(default_factory=set)
    _named: bool = False

    def look(self, tasks: Iterable[Task], strings: Strings) -> None:
        """Take in how the tasks stand now."""
        new = {(task.id, task.attempt): task for task in tasks}
        past = self._past & set(new)
        attempts = {attempt: task for attempt, task in new.items() if attempt not in past}
        sent = [task for task in attempts.values() if task.state is not State.CANCELLED]
        ready = [task for task in sent if task.state is State.DONE]
        ended = all(task.over for task in attempts.values())
        if ready and not self._named:
            if ended and len(sent) > 1:
                self._say(strings("result.ready_of", ready=len(ready), total=len(sent)))
            else:
                self._say(strings("result.ready", name=ready[0].name))
        elif ready and ended and len(sent) > 1:
            self._say(strings("result.ready_of", ready=len(ready), total=len(sent)))
        self._named = bool(ready) and not ended
        self._past = past | set(attempts) if ended else past

    def _say(self, text: str) -> None:
        self.text = text
        self.number += 1
