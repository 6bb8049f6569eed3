"""The epochs of a training: steps, choices, checkpoints, and what is said in the end."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepack.compress import _tune_state as checkpoint
from edgepack.compress._tune_judge import Judge, halves
from edgepack.compress._tune_state import State
from edgepack.compress._tune_steps import build, rate_at, restore, seed_of, state_of
from edgepack.errors import InputError, counted

if TYPE_CHECKING:
    from edgepack.compress._tune_feed import Feed, Samples
    from edgepack.compress._tune_lesson import Lesson
    from edgepack.compress._tune_loop import Training

EPOCHS_DONE, OUT_OF_TIME, NO_BETTER = "the number of epochs", "the time budget", "no better epoch"


class Epochs:
    """Goes through the epochs, from the last checkpoint on."""

    def __init__(self, training: Training, lesson: Lesson, feed: Feed) -> None:
        self.training, self.lesson = training, lesson
        self.module, self.run, self.settings = training.module, training.run, training.settings
        self.folder = training.run.workdir / training.name
        self.feed, self.judge = self._split(feed)
        self.optimizer = build(self.module, lesson.beside, self.settings)
        self.state = State(self._identity())

    def run_all(self) -> None:
        found = checkpoint.load(self.folder, self.state.identity)
        if found is None:
            if self.folder.exists():
                self.run.note(f"{self.training.name}: begun anew: what an earlier run left is of another training")
            self._begin()
        else:
            self._resume(found)
        while self.state.ended is None:
            self._epoch()
        self._finish()

    def _split(self, feed: Feed) -> tuple[Feed, Judge | None]:
        """What is trained on, and who judges on what is not."""
        task, held_out = self.training.task, self.settings.held_out
        own = task.evaluation is not None and task.metric is not None
        data = task.evaluation if own else feed.data
        assert data is not None
        choose, report, rest = halves(len(data), held_out, feed.seeds, own)
        if not len(choose):
            return feed, None
        metric = task.metric
        if not own and metric is not None and not metric.needs_original:
            metric = metric if self.lesson.loss is not None else None
        watched = replace(feed, data=data)
        judge = Judge(self.module, watched, choose, report, metric, self.run.original, self.lesson.plain, not own)
        return feed if own else replace(feed, rows=rest), judge

    def _identity(self) -> str:
        task, settings = self.training.task, asdict(self.settings)
        first = next(iter(self.feed.data.take(self.feed.rows[:1].tolist())))
        facts: dict[str, Any] = {
            "pass": self.run.identity, "settings": settings, "seed": self.run.seed, "samples": len(self.feed.rows),
            "first": [array.tobytes().hex() for array in first.inputs.values()], "augment": task.augment,
            "loss": None if task.loss is None else task.loss.name, "threads": torch.get_num_threads(),
            "metric": None if self.judge is None else self.judge.name,
        }  # fmt: skip
        return checkpoint.digest(facts, self.module, self.lesson.teacher, self.lesson.beside)

    def _begin(self) -> None:
        row: dict[str, Any] = {"epoch": 0}
        if self.judge is not None:
            row |= {"choice": self.judge.choice(), "report": self.judge.verdict()}
            if self.training.hold.settled <= 0:
                self._choose(row)
        self.state.rows.append(row)

    def _resume(self, found: State) -> None:
        self.state = found
        if found.ended is not None:
            return
        _put(self.module, found.part("module"))
        _put(self.lesson.beside, found.part("beside"))
        restore(self.optimizer, found.part("optimizer"))
        self.run.note(f"{self.training.name}: went on after epoch {found.epochs}, where an earlier run was interrupted")

    def _epoch(self) -> None:
        number, began, total = self.state.epochs, time.perf_counter(), 0.0
        torch.manual_seed(seed_of(*self.feed.seeds, number + 1))
        text = f"{self.training.name}: epoch {number + 1} of {self.settings.epochs}"
        step, done = self.run.progress(text, self.feed.steps * self.feed.size), 0
        for index, parts in enumerate(self.feed.epoch(number + 1)):
            total += self._step(number * self.feed.steps + index, parts)
            done += 1
            step(sum(part.count for part in parts))
            if self._over(time.perf_counter() - began):
                break
        self.state.epochs += 1
        self.state.seconds += time.perf_counter() - began
        row = {"epoch": self.state.epochs, "loss": total / done, "steps": done,
               "seconds": round(time.perf_counter() - began, 2)}  # fmt: skip
        self._advance((number + 1) / self.settings.epochs)
        if self.judge is not None:
            row["choice"] = self.judge.choice()
            if number + 1 >= self.training.hold.settled * self.settings.epochs:
                self._choose(row)
        self.state.rows.append(row)
        self.state.ended = self._reason()
        self._save()

    def _step(self, number: int, parts: list[Samples]) -> float:
        """One step on samples of one size or several; the loss before it."""
        steps = self.settings.epochs * self.feed.steps
        self._advance(number / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(number, steps, self.settings)
        self.optimizer.zero_grad()
        count, total = sum(part.count for part in parts), 0.0
        for part in map(self.feed.mixed, parts) if self.settings.mixup else parts:
            loss = self.lesson.whole(part) * (part.count / count)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not np.isfinite(total):
            advice = f"train more gently: lr below {self.settings.rate:g}, or clip below {self.settings.clip:g}"
            raise InputError(f"{self.training.name}: the loss is {total} in step {number + 1} of {steps}", advice)
        moved = [value for group in self.optimizer.param_groups for value in group["params"]]
        nn.utils.clip_grad_norm_(moved, self.settings.clip)
        self.optimizer.step()
        with torch.no_grad():
            for project in self.training.hold.project:
                project()
        return total

    def _advance(self, progress: float) -> None:
        with torch.no_grad():
            for advance in self.training.hold.schedule:
                advance(progress)

    def _choose(self, row: dict[str, Any]) -> None:
        if self.state.best_score is None or row["choice"] >= self.state.best_score:
            self.state.best, self.state.best_score = row["epoch"], row["choice"]
            self.state.put("best", _tensors(self.module))

    def _over(self, seconds: float) -> bool:
        limit = self.settings.minutes
        return limit is not None and self.state.seconds + seconds > 60 * limit

    def _reason(self) -> str | None:
        """Why this was the last epoch, None where it was not."""
        state, patience = self.state, self.settings.patience
        if state.epochs == self.settings.epochs:
            return EPOCHS_DONE
        if self._over(0.0):
            return OUT_OF_TIME
        waited = patience is not None and state.best is not None and state.epochs - state.best >= patience
        return NO_BETTER if waited else None

    def _save(self) -> None:
        state = self.state
        if state.ended is None:
            state.put("module", _tensors(self.module))
            state.put("beside", _tensors(self.lesson.beside))
            state.put("optimizer", state_of(self.optimizer))
        else:
            best = state.part("best") or _tensors(self.module)
            state.tensors = {}
            state.put("module", best)
        state.save(self.folder)

    def _finish(self) -> None:
        _put(self.module, self.state.part("module"))
        self.training.hold.enforce(1.0)
        state, samples = self.state, sum(row.get("steps", 0) for row in self.state.rows) * self.feed.size
        values: dict[str, Any] = {
            "epochs": state.rows, "kept": state.epochs if state.best is None else state.best, "ended": state.ended,
            "samples": samples, "seconds": round(state.seconds, 1), "labels": self.lesson.loss is not None,
            "teacher": self.settings.teacher,
        }  # fmt: skip
        if self.judge is not None:
            values["report"] = self.judge.verdict()
        self.run.record(self.training.name, values)
        self.run.note(self._summary(values))

    def _summary(self, values: dict[str, Any]) -> str:
        taught = [] if self.lesson.teacher is None else [f"teacher {self.settings.teacher}"]
        sources = " and ".join([*taught, *(["labels"] if self.lesson.loss is not None else [])])
        epochs = counted(self.state.epochs, "epoch")
        text = (f"{self.training.name}: {epochs} of {len(self.feed.rows)} samples from {sources}; "
                f"ended by {values['ended']}, kept epoch {values['kept']}")  # fmt: skip
        if self.judge is None:
            return text
        before, after = self.state.rows[0]["report"]["value"], values["report"]["value"]
        write = "{:.4g}".format if self.judge.metric is None else self.judge.metric.format
        count = values["report"]["samples"]
        return f"{text}; {self.judge.name} {write(before)} before, {write(after)} after, on {count} samples held out"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = _tensors(module)
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)
