"""The journal of a search: which trials were drawn, what they scored and how they ended, and what is drawn next.

The only module that knows Optuna. One process writes a journal at a time, and what it writes outlives it at once; what
is drawn for a trial depends on the seed, its number and what is known then, so a search that goes on draws the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from promptmux_server.errors import TrainingError
from promptmux_server.training.search.record import State, TrialRecord
from promptmux_server.training.search.space import Axis, Choice

JOURNAL, LOCK = "journal.jsonl", "journal.jsonl.lock"
NAME = "search"
ABOUT, IDENTITY, JOINED, FAILED = "about", "identity", "joined", "failed"
FEWEST_FOR_IMPORTANCES = 8
"""Trials; of fewer nothing can be said."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """An open journal."""

    def __init__(self, study: optuna.Study, space: Mapping[str, Axis], seed: int) -> None:
        self._study, self._space, self._seed = study, space, seed
        self._live: dict[int, optuna.Trial] = {}

    @classmethod
    def open(cls, folder: Path, space: Mapping[str, Axis], seed: int) -> Self:
        """Go on with a folder's journal, or begin one; only for who holds the folder."""
        (folder / LOCK).unlink(missing_ok=True)  # of a process that died: Optuna would wait for it half a minute
        _forget_cut_line(folder / JOURNAL)
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        study = optuna.create_study(storage=storage, study_name=NAME, direction="maximize", load_if_exists=True)
        return cls(study, space, seed)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A journal to look at, while another process may write it. Raises TrainingError where there is none."""
        if not (folder / JOURNAL).exists():
            raise TrainingError("There is no journal of a search in this folder: name the `output` of one.")
        try:
            storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
            return cls(optuna.load_study(study_name=NAME, storage=storage), {}, 0)
        except (ValueError, KeyError) as error:
            raise TrainingError("The journal in this folder is damaged, or no search has begun to write it.") from error

    @property
    def about(self) -> dict[str, Any]:
        """What `hold` was told."""
        return dict(self._study.user_attrs.get(ABOUT, {}))

    def hold(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write down what the search is, and what reports say of it.

        Raises TrainingError where the journal is another search's.
        """
        now = json.loads(json.dumps(identity))
        found = self._study.user_attrs.get(IDENTITY, now)
        differing = [topic for topic in now if found.get(topic) != now[topic]]
        if differing:
            raise TrainingError(
                f"The trials in this output folder are of another search: its {', '.join(differing)} differ. Put back "
                "what the search began with, or choose another folder as `output`."
            )
        self._study.set_user_attr(IDENTITY, now)
        self._study.set_user_attr(ABOUT, dict(about))

    def draw(self, clock: int) -> TrialRecord:
        """The next trial, which joins at a time of the search's clock."""
        return self._drawn(self._study.ask(), clock)

    def go_on(self, clock: int) -> list[TrialRecord]:
        """Trials that have not ended; one whose drawing was cut short is drawn to its end, and joins at `clock`."""
        found = []
        for frozen in self._frozen():
            if frozen.state == TrialState.RUNNING:
                trial = optuna.Trial(self._study, frozen._trial_id)
                found.append(self._drawn(trial, frozen.user_attrs.get(JOINED, clock)))
        return found

    def report(self, number: int, step: int, score: float) -> None:
        """Write a score down; what was written before stands."""
        if step not in self._frozen()[number].intermediate_values:
            self._live[number].report(score, step)

    def goes_on(self, number: int, step: int, reduction: int) -> bool:
        """Whether a trial is among the best of those that were scored at a step: one of `reduction`, or the best.

        Asynchronous successive halving (Li et al. 2018). Optuna's own judges each trial when it reports, before its
        neighbours in the batch have, and so lets the first of them pass whatever the others score.
        """
        scores = {
            other.number: other.intermediate_values[step]
            for other in self._frozen()
            if step in other.intermediate_values
        }
        ranked = sorted(scores, key=lambda rival: (-scores[rival], rival))
        return ranked.index(number) < max(1, len(scores) // reduction)

    def end(self, number: int, state: State, score: float | None = None, reason: str | None = None) -> None:
        """A trial is over. To the sampler, one that failed is like the worst that were pruned."""
        trial = self._live.pop(number)
        if reason is not None:
            trial.set_user_attr(FAILED, reason)
        if state == "complete":
            self._study.tell(trial, score)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def trials(self) -> list[TrialRecord]:
        """All that were drawn, by number."""
        return [_record(frozen) for frozen in self._frozen()]

    def importances(self, step: int) -> dict[str, float]:
        """How much each field decides which scores are good at a step (PED-ANOVA); {} where too little is known.

        A trial that failed counts as scoring 0; one whose score at the step is not known does not count.
        """
        known = optuna.create_study(direction="maximize")
        for frozen in self._frozen():
            score = 0.0 if FAILED in frozen.user_attrs else frozen.intermediate_values.get(step)
            if score is not None:
                known.add_trial(create_trial(value=score, params=frozen.params, distributions=frozen.distributions))
        found = [trial.value for trial in known.get_trials(deepcopy=False)]
        if len(found) < FEWEST_FOR_IMPORTANCES or len(set(found)) == 1:
            return {}
        searched = [
            name for name, axis in known.get_trials(deepcopy=False)[0].distributions.items() if not axis.single()
        ]
        return optuna.importance.get_param_importances(known, params=searched)

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _drawn(self, trial: optuna.Trial, clock: int) -> TrialRecord:
        self._study.sampler = self._sampler(trial.number, "")
        assert trial.relative_params is not None  # drawn now, all together; the next lines take from it what it has
        for field, axis in self._space.items():
            self._study.sampler = self._sampler(trial.number, field)
            _draw_value(trial, field, axis)
        trial.set_user_attr(JOINED, clock)
        self._live[trial.number] = trial
        return _record(self._frozen()[trial.number])

    def _sampler(self, number: int, field: str) -> optuna.samplers.BaseSampler:
        """One for a trial's field alone: it has no past of its own, which a process that dies would take with it."""
        digest = hashlib.blake2b(f"{self._seed} {number} {field}".encode(), digest_size=4).digest()
        return optuna.samplers.TPESampler(seed=int.from_bytes(digest, "big"), multivariate=True)


def _draw_value(trial: optuna.Trial, field: str, axis: Axis) -> None:
    if isinstance(axis, Choice):
        trial.suggest_categorical(field, axis.values)
    elif axis.whole:
        trial.suggest_int(field, int(axis.low), int(axis.high), step=int(axis.step or 1), log=axis.log)
    else:
        trial.suggest_float(field, axis.low, axis.high, step=axis.step, log=axis.log)


def _record(frozen: FrozenTrial) -> TrialRecord:
    reason = frozen.user_attrs.get(FAILED)
    scores = dict(sorted(frozen.intermediate_values.items()))
    state: State = "running"
    if frozen.state.is_finished():
        state = "complete" if frozen.state == TrialState.COMPLETE else "pruned" if reason is None else "failed"
    score = frozen.value if state == "complete" else max(scores.values(), default=None)
    return TrialRecord(
        frozen.number, state, frozen.params, scores, score, reason, joined=frozen.user_attrs.get(JOINED, 0)
    )


def _forget_cut_line(journal: Path) -> None:
    """Cut off a last line that a power cut left unfinished: it would spoil the next one."""
    with suppress(FileNotFoundError), journal.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
