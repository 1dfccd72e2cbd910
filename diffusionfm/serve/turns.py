"""Whose turn it is: start-time fair queueing."""

from __future__ import annotations


class Turns:
    """Numbers pieces of work so that serving the lowest number first is fair between clients.

    Start-time fair queueing (Goyal, Vin and Cheng 1996): a client's next piece starts, in virtual time, where its
    last one ended, and never before now. Who asks for fifty pictures gets fifty numbers far apart, and whoever
    comes then for one stands right behind the first of them.
    """

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    def take(self, client: str, cost: float, now: float) -> float:
        """The number of a piece of work. now: the lowest number still unserved, 0 when there is none."""
        self._ends = {name: end for name, end in self._ends.items() if end > now}
        start = self._ends.get(client, now)
        self._ends[client] = start + cost
        return start

    def reset(self) -> None:
        """Forget every client: nothing is waiting."""
        self._ends.clear()
