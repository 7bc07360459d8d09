"""Decoding memory: what is handed out is disjoint, counted exactly, and all there again when everyone has gone."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from promptmux_kernels import FILL
from promptmux_server.engine.memory import Claim, DecodingMemory

SLOTS, PLACES = 50, 20 * FILL


def places_of(claim: Claim) -> range:
    return range(claim.start, claim.start + -(-claim.length // FILL) * FILL)


class Memory(RuleBasedStateMachine):
    """Any sequence of claims and releases."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = DecodingMemory(SLOTS, PLACES + 3)  # what is not a multiple of FILL is left unused
        self.held: list[Claim] = []

    claims = Bundle("claims")

    @rule(target=claims, slots=st.integers(0, 20), length=st.integers(1, 6 * FILL))
    def claim(self, slots: int, length: int) -> Claim | None:
        found = self.memory.claim(slots, length)
        if found is None:
            used = {place for claim in self.held for place in places_of(claim)}
            free_runs = "".join("x" if place in used else "." for place in range(0, PLACES, FILL)).split("x")
            need = -(-length // FILL)
            assert slots > SLOTS - sum(len(c.slots) for c in self.held) or need > max(map(len, free_runs))
        else:
            self.held.append(found)
        return found

    @rule(claim=consumes(claims))
    def release(self, claim: Claim | None) -> None:
        if claim is not None:
            self.memory.release(claim)
            self.held.remove(claim)

    @invariant()
    def counted_exactly_and_never_shared(self) -> None:
        slots = [slot for claim in self.held for slot in claim.slots]
        places = [place for claim in self.held for place in places_of(claim)]
        assert len(set(slots)) == len(slots)
        assert len(set(places)) == len(places)
        assert set(slots) <= set(range(SLOTS))
        assert set(places) <= set(range(PLACES))
        stats = self.memory.stats()
        assert (stats.slots_used, stats.slots, stats.places_used, stats.places) == (
            len(slots),
            SLOTS,
            len(places),
            PLACES,
        )


TestMemory = Memory.TestCase


def test_a_claim_is_given_back_once() -> None:
    memory = DecodingMemory(4, FILL)
    claim = memory.claim(2, 1)
    assert claim
    memory.release(claim)
    with pytest.raises(KeyError):
        memory.release(claim)
    assert memory.claim(4, FILL)


def test_what_can_never_fit_is_known_beforehand() -> None:
    memory = DecodingMemory(4, 2 * FILL)
    assert memory.claim(1, FILL)
    assert memory.fits(4, 2 * FILL)
    assert not memory.fits(5, 1)
    assert not memory.fits(1, 2 * FILL + 1)
