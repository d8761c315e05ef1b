"""Whether asking a layer's router early is worth its time: by what the layer has waited for, and what asking took.

Where nearly all experts are in memory a layer hardly waits, and asking takes more than it saves.
"""

from __future__ import annotations

TRIAL = 4  # forwards before it is judged
_RATE = 0.1  # weight of one forward in the means, once there have been ten
_FORGETTING = 0.98  # of what asking took, for every forward without: the first times take longer, and machines change


class Payoff:
    """Of one layer, in forwards of one kind: it pays where the layer waits for longer than asking takes.

    >>> payoff = Payoff()
    >>> for _ in range(TRIAL):
    ...     payoff.asked(0.0001)
    ...     payoff.waited(0.00005)
    >>> payoff.pays
    False
    """

    def __init__(self) -> None:
        self._stall_s = self._asking_s = 0.0
        self._forwards = self._times_asked = 0
        self._asked = False  # in this forward

    @property
    def pays(self) -> bool:
        return self._forwards < TRIAL or self._stall_s > self._asking_s

    def asked(self, seconds: float) -> None:
        """So long the early word took, prediction apart, which would have been made later."""
        self._asked = True
        self._times_asked += 1
        self._asking_s += (seconds - self._asking_s) * max(_RATE, 1 / self._times_asked)

    def waited(self, seconds: float) -> None:
        """A forward of the layer has ended, which had nothing to compute for so long."""
        self._forwards += 1
        self._stall_s += (seconds - self._stall_s) * max(_RATE, 1 / self._forwards)
        if not self._asked:
            self._asking_s *= _FORGETTING
        self._asked = False
