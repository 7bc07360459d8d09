"""Any sequence of operations, crashes in the middle of them included, does to a store what it does to a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from promptmux_prompts import ABSENT, NameNotFound, Store, VersionMismatch, VersionNotFound
from promptmux_prompts.records import Expected
from prompts.store_cases import file_of, kept, prompt, publish, unfinished
from prompts.watched_disk import Change, WatchedDisk

KEEP = 3
NAMES = st.sampled_from(["a", "b"])
NUMBERS = st.integers(0, 4)
EXPECTED = st.sampled_from([None, None, None, ABSENT, 1, 2, 3, 5])
CRASH = st.none() | st.integers(1, 24)
"""The change at which the process dies, if it makes as many."""


@dataclass
class Name:
    """What the model knows of a name."""

    versions: dict[int, int] = field(default_factory=dict)
    """Number of the content by version, of those that can be read."""
    stands: int | None = None
    latest: int = 0
    pinned: bool = False
    seed: str | None = None

    def check(self, expected: Expected) -> None:
        if expected not in (None, ABSENT if self.stands is None else self.stands):
            raise VersionMismatch

    def publish(self, number: int, expected: Expected, seed: bool) -> int:
        self.check(expected)
        if self.stands is None or self.versions[self.stands] != number:
            self.latest += 1
            self.stands = self.latest
            self.versions[self.stands] = number
        self.seed = prompt(number).digest if seed else self.seed
        return self.stands

    def rollback(self, to: int | None, expected: Expected) -> int:
        self.require(expected)
        targets = [version for version in self.versions if (version == to if to else version < (self.stands or 0))]
        if not targets:
            raise VersionNotFound
        self.stands = max(targets)
        return self.stands

    def delete(self, expected: Expected) -> None:
        self.require(expected)
        self.versions, self.stands, self.pinned = {}, None, False

    def pin(self, pinned: bool) -> None:
        self.require(None)
        self.pinned = pinned

    def collect(self) -> None:
        keep = {*sorted(self.versions)[-KEEP:], self.stands}
        self.versions = {version: number for version, number in self.versions.items() if version in keep}

    def require(self, expected: Expected) -> None:
        self.check(expected)
        if self.stands is None:
            raise NameNotFound


class Died(BaseException):
    """The process ended: nothing that comes after it in the program happens."""


Model = dict[str, Name]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.model: Model = {"a": Name(), "b": Name()}
        self.left: int | None = None
        self.start()

    def start(self) -> None:
        """As after a restart of the server."""
        self.left = None
        self.store = Store.open(self.root, keep_versions=KEEP, disk=WatchedDisk(self.root, before=self.count))
        assert self.store.recover().damaged == ()

    def count(self, change: Change) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                raise Died

    def both(self, crash: int | None, act: Callable[[Store], object], expect: Callable[[Model], object]) -> None:
        """Do something to the store and to the model; where the store crashed, it may have happened or not."""
        before, self.left = deepcopy(self.model), crash
        expected = outcome(lambda: expect(self.model))
        try:
            found = outcome(lambda: act(self.store))
        except Died:
            self.start()
            if not self.agrees(self.model):
                assert self.agrees(before)
                self.model = before
            return
        self.left = None
        assert found == expected

    def agrees(self, model: Model) -> bool:
        return all(self.found(name) == known for name, known in model.items())

    def found(self, name: str) -> Name:
        head = self.store.head(name)
        if head is None:
            return Name()
        numbers = {file_of(number): number for number in range(5)}
        versions = {version: numbers[content] for version, content in kept(self.store, name).items()}
        return Name(versions, None if head.deleted else head.version, head.latest, head.pinned, head.seed)

    @rule(name=NAMES, number=NUMBERS, expected=EXPECTED, seed=st.booleans(), crash=CRASH)
    def publish(self, name: str, number: int, expected: Expected, seed: bool, crash: int | None) -> None:
        self.both(
            crash,
            lambda store: publish(store, name, number, expected=expected, seed=seed).version,
            lambda model: model[name].publish(number, expected, seed),
        )

    @rule(name=NAMES, to=st.none() | st.integers(1, 6), expected=EXPECTED, crash=CRASH)
    def rollback(self, name: str, to: int | None, expected: Expected, crash: int | None) -> None:
        self.both(
            crash,
            lambda store: store.rollback(name, author="x", to=to, expected=expected).version,
            lambda model: model[name].rollback(to, expected),
        )

    @rule(name=NAMES, expected=EXPECTED, crash=CRASH)
    def delete(self, name: str, expected: Expected, crash: int | None) -> None:
        self.both(
            crash,
            lambda store: store.delete(name, author="x", expected=expected),
            lambda model: model[name].delete(expected),
        )

    @rule(name=NAMES, pinned=st.booleans(), crash=CRASH)
    def pin(self, name: str, pinned: bool, crash: int | None) -> None:
        self.both(
            crash,
            lambda store: store.set_pinned(name, pinned, author="x") and None,
            lambda model: model[name].pin(pinned),
        )

    @rule()
    def collect(self) -> None:
        self.store.collect(older_than_s=-60)
        for name in self.model.values():
            if name.stands is not None:
                name.collect()

    @rule(crash=st.integers(1, 12))
    def collect_and_die(self, crash: int) -> None:
        """Versions that are not kept may be gone or not."""
        self.left = crash
        try:
            self.store.collect(older_than_s=-60)
        except Died:
            self.start()
        self.left = None
        self.collect()

    @rule()
    def restart(self) -> None:
        self.start()
        assert unfinished(self.root) == []

    @invariant()
    def store_and_model_agree(self) -> None:
        assert {name: self.found(name) for name in self.model} == self.model

    def teardown(self) -> None:
        shutil.rmtree(self.root)


def outcome(act: Callable[[], object]) -> object:
    """What it returned, or the kind of its refusal."""
    try:
        return act()
    except (NameNotFound, VersionMismatch, VersionNotFound) as refusal:
        return type(refusal)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStoreMachine = StoreMachine.TestCase
