"""Checkpoints that are whole or not there.

A step is a folder with the state, as Orbax writes it, and a manifest, which is written last: to a
temporary name, synced, renamed. It holds the size and SHA-256 of every file. A folder whose files differ
from it is damaged, and is never read. What one without a manifest is `step_folder` says: left behind by
a killed save, or a step that has lost it.

Of several processes each writes its part of the state, and calls the same methods in the same order. The
first one alone looks at the folder, and decides for all.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxnets import errors
from jaxnets.errors import first_line
from jaxnets.remote import as_path
from jaxnets.train import array_store, files, hosts, manifest, step_folder
from jaxnets.train.at_exit import wait_at_exit
from jaxnets.train.health import abstract_health, fresh_health
from jaxnets.train.host_copy import copied_to_host, renewed
from jaxnets.train.manifest import MANIFEST, Manifest, describe
from jaxnets.train.state import TrainState, as_dict
from jaxnets.train.verdict import by_first, together
from jaxnets.typing import PyTree

STATE = "state"
_TIMEOUT_S = 3600.0  # for what takes as long as the slowest disk does


class Checkpoints:
    """The checkpoints of one run: the latest ones and the best ones are kept.

    Saving returns as soon as the state is copied to the host's memory; files, digests and the manifest
    are written by a thread. Older checkpoints are deleted only after a newer one is complete. Use it as
    a context, or call `wait`, so that the last save is complete; a program that ends without either
    waits too.

    Args:
        folder: where; made when the first step is saved.
        maximize: whether a greater score is the better one.
        num_best: how many of the best are kept, at least 1.
        num_recent: how many of the latest are kept, at least 1; with 2 there is one to fall back to.

    Attributes:
        newest: the newest step that is known of saves and from the last look at the folder, or None; to
            be asked from any thread, since it waits for nothing. Of several processes the first knows.
    """

    def __init__(
        self, folder: Path | str, *, maximize: bool = True, num_best: int = 1, num_recent: int = 2
    ):
        if num_best < 1:
            raise errors.ConfigError(f"at least the best checkpoint is kept, not the best {num_best}")
        if num_recent < 1:
            raise errors.ConfigError(f"at least the latest checkpoint is kept, not {num_recent}")
        self.folder = as_path(folder).absolute()
        self._sign = 1 if maximize else -1
        self._num_best, self._num_recent = num_best, num_recent
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self.newest: int | None = None
        self._whole: dict[int, Manifest] = {}  # what this object has seen to be so

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def steps(self) -> list[int]:
        """The steps that have a manifest, in order."""
        return by_first("checkpoints/steps", self._steps)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best score, the earlier one of equals, or None if none has a score."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[int]:
        """The steps that have a score, the best one first, the earlier one of equals before the later.

        A score that isn't a number counts as none.
        """
        return by_first("checkpoints/ranked", self._ranked)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            DamagedError: if it isn't what was written.
            CheckpointError: if there is none.
        """
        if hosts.count() == 1:
            return self._manifest(step)
        content = by_first("checkpoints/manifest", lambda: dataclasses.asdict(self._manifest(step)))
        return Manifest(**content)

    def clean(self) -> list[str]:
        """Remove what interrupted saves left behind; the names of what was removed.

        A step that has lost its manifest isn't that: see `newest_whole`.
        """

        def clean() -> list[str]:
            removed = []
            for path in step_folder.numbered(self.folder):
                if (path / MANIFEST).exists():
                    step_folder.finish(path)  # if the kill came just before that
                elif step_folder.is_left_over(path):
                    step_folder.remove(path)
                    removed.append(path.name)
            return removed

        return by_first("checkpoints/clean", clean)

    def discard(self, step: int) -> None:
        """Delete a step."""

        def discard() -> None:
            self._discard(step)
            self._steps()

        by_first("checkpoints/discard", discard)

    def newest_whole(self, *, set_aside: bool = True) -> tuple[int | None, list[str]]:
        """The newest step whose files are what was written; damaged ones after it are set aside.

        So are all that have lost their manifest. They are renamed, to 00000012.damaged, and not deleted.

        Args:
            set_aside: a mere reader leaves damaged steps as they are.

        Returns:
            the step, None if nothing was ever saved, and a line about each damaged one after it.

        Raises:
            CheckpointError: if there is no whole step, but damaged ones; or one can't be read at all.
        """
        lost = by_first("checkpoints/lost", self._lost)
        damaged = {step: str(manifest.damaged(step, self.path(step) / MANIFEST)) for step in lost}
        for step in reversed(self.steps()):
            try:
                self.check_files(step)
            except errors.DamagedError as error:
                damaged[step] = str(error)
                continue
            found = step
            break
        else:
            found = None
        self.newest = found
        if found is not None and set_aside:
            return found, by_first("checkpoints/aside", lambda: self._set_aside(damaged, found))
        if found is not None:
            return found, [f"{why}; step {found} is taken instead" for why in damaged.values()]
        names = by_first("checkpoints/damaged", lambda: step_folder.those_set_aside(self.folder))
        if damaged or names:
            why = damaged[max(damaged)] if damaged else f"{names[-1]} was set aside as damaged"
            advice = "; --no-resume begins anew and keeps them" if set_aside else ""
            raise errors.CheckpointError(f"no checkpoint in {self.folder} is whole: {why}{advice}")
        return None, []

    def is_whole(self, step: int) -> bool:
        """Whether a step is there, and its files are what was written."""
        try:
            self.check_files(step)
        except errors.CheckpointError:
            return False
        return True

    def amend(self, step: int, *, score: float | None, extra: Mapping[str, Any]) -> None:
        """Give a step that was saved before its evaluation what belongs to it; all of it or nothing.

        Args:
            step: one of `steps()`.
            score: as in `save`.
            extra: as in `save`; it replaces what was there.

        Raises:
            CheckpointError: if there is no such step, or its manifest is damaged.
        """
        self.wait()

        def amend() -> None:
            record = dataclasses.replace(self._manifest(step), score=score, extra=dict(extra))
            manifest.write_manifest(self.path(step), record)

        by_first("checkpoints/amend", amend)
        self._whole.pop(step, None)

    def save(
        self,
        state: TrainState,
        *,
        score: float | None = None,
        extra: Mapping[str, Any] | None = None,
        keep: Sequence[int] = (),
    ) -> None:
        """Begin to save; an earlier save is waited for.

        Args:
            state: may be donated to the next step as soon as this returns.
            score: of the monitored metric, if the state was evaluated.
            extra: what JSON can hold.
            keep: steps to keep beside this one, the latest and the best ones.

        Raises:
            CheckpointError: if the earlier save failed, or nothing can be written.
        """
        self.wait()
        step = int(state.step)
        if not by_first("checkpoints/begin", lambda: self._begin(step)):
            return
        copy = self._copied(step, as_dict(state))
        record = Manifest(step, score, describe(copy), {}, dict(extra or {}), manifest.versions())
        array_store.prepare()
        wait_at_exit(self)
        end = array_store.begin_save(self.path(step) / STATE, copy)
        try:
            self._pending = self._executor.submit(self._write, end, record, set(keep))
        except RuntimeError as error:  # by then Python starts no work in threads any more
            with contextlib.suppress(OSError):
                step_folder.remove(self.path(step))
            raise self._failed(step, "the program is ending, or this was closed") from error

    def check(self) -> None:
        """Raise the error of a save that has failed since; it doesn't wait.

        Of several processes one may know before the others, which would wait for it in the next step. So
        there it does nothing: all learn of it when the next save begins, or in `wait`.
        """
        if hosts.count() == 1 and self._pending and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being saved.

        Raises:
            CheckpointError: if the save failed, on whichever process.
        """
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Manifest]:
        """Read a step.

        A checkpoint with `health` can be gone on with without it, and the other way round: then it
        begins anew.

        Args:
            step: one of `steps()`.
            abstract: shapes, dtypes and shardings of the state, as of `Strategy.abstract`.

        Returns:
            the state, with those shardings, and the manifest.

        Raises:
            DamagedError: if a file isn't what was written.
            CheckpointError: if the state is another model's or optimizer's, or can't be read.
        """
        found = self.manifest(step)
        # Skipping may be switched on or off when a run goes on: what it counts is no part of the model.
        wants_health = abstract.health is not None
        has_health = any(name.startswith("health/") for name in found.arrays)
        if has_health != wants_health:
            abstract = dataclasses.replace(
                abstract, health=abstract_health(abstract.guard.sharding) if has_health else None
            )
        wanted = describe(as_dict(abstract))
        for name in sorted(wanted.keys() | found.arrays.keys()):
            there, here = found.arrays.get(name), wanted.get(name)
            if there != here:
                raise errors.CheckpointError(
                    f"the checkpoint in {self.path(step)} is of another model or optimizer: "
                    f"{name} is {there or 'missing'} there and {here or 'missing'} here"
                )
        try:
            if self._whole.get(step) != found:
                self.check_files(step)
        except errors.DamagedError as error:
            raise errors.DamagedError(f"{error}; choose another step") from error
        loaded: list[PyTree] = []
        together(
            "checkpoints/restore",
            lambda: loaded.append(self._load(step, abstract, wanted)),
            timeout_s=_TIMEOUT_S,
        )
        # Fresh from Orbax arrays can't be donated, and the first step would hold the state twice.
        state = TrainState(**renewed(loaded.pop(), as_dict(abstract)))
        if has_health != wants_health:
            place = abstract.guard.sharding
            health = jax.jit(fresh_health, out_shardings=place)() if wants_health else None
            state = dataclasses.replace(state, health=health)
        return state, found

    def _copied(self, step: int, tree: PyTree) -> PyTree:
        """The state on the host, of all processes or none."""
        copies: list[PyTree] = []

        def work() -> None:
            try:
                # Orbax would copy it too, but not on a CPU: the next step would write over it.
                copies.append(copied_to_host(tree))
            except jax.errors.JaxRuntimeError as error:
                if not errors.is_out_of_memory(error):
                    raise
                num_bytes = sum(x.nbytes for x in jax.tree.leaves(tree))
                raise errors.CheckpointError(
                    f"the host has no memory for a copy of the state ({num_bytes:,} bytes over all "
                    f"devices): {first_line(error)}"
                ) from error

        try:
            together("checkpoints/copied", work)
        except Exception as error:

            def remove() -> None:
                with contextlib.suppress(OSError):
                    step_folder.remove(self.path(step))

            by_first("checkpoints/not copied", remove)
            if isinstance(error, errors.UserError):
                raise self._failed(step, str(error)) from error
            raise
        return copies[0]

    def _load(self, step: int, abstract: TrainState, wanted: Mapping[str, str]) -> PyTree:
        try:
            restored = array_store.load(self.path(step) / STATE, as_dict(abstract))
        except Exception as error:
            manifest.check_is_there(self.path(step), step)
            raise errors.CheckpointError(
                f"the checkpoint in {self.path(step)} can't be read: {first_line(error)}"
            ) from error
        manifest.check_is_there(self.path(step), step)  # else parts of it may be missing
        if describe(restored) != wanted:  # Orbax reads in threads, which know no context of JAX's
            raise errors.CheckpointError(
                "the checkpoint holds 64-bit arrays: enable them for the whole process, JAX_ENABLE_X64=1"
            )
        return restored

    def _begin(self, step: int) -> bool:
        """Make the step's folder; whether it is to be written."""
        folder = self.path(step)
        if (folder / MANIFEST).exists():
            return False
        try:
            if step_folder.has_lost_manifest(folder):
                aside = step_folder.set_aside(folder).name
                hosts.say(f"warning: {manifest.damaged(step, folder / MANIFEST)}; it is kept as {aside}")
            elif folder.exists():
                step_folder.remove(folder)
            files.make_folders(self.folder)
            step_folder.make(folder)
        except OSError as error:
            raise self._failed(step, self._why(error)) from error
        return True

    def _write(self, end: Callable[[], None], record: Manifest, keep: set[int]) -> None:
        """What a save does behind: here nothing may be asked of the devices."""
        folder = self.path(record.step)

        def write() -> dict[str, tuple[int, str]]:
            try:
                # Of several processes Orbax has begun by now. After a power cut before this the step
                # looks as if it had lost its manifest, which is the safe side.
                if hosts.is_first():
                    files.sync(folder)
                end()
                return manifest.seal_files(folder, array_store.own_files(folder / STATE))
            except Exception as error:
                raise errors.CheckpointError(self._why(error)) from error

        parts, failure = [], None
        try:
            parts = together("checkpoint/written", write, timeout_s=_TIMEOUT_S)
        except errors.CheckpointError as error:
            failure = error

        def complete() -> None:
            try:
                if failure:
                    raise failure
                self._complete(record, parts)
            except Exception as error:
                if not (folder / MANIFEST).exists():
                    with contextlib.suppress(OSError):
                        step_folder.remove(folder)
                why = str(error) if error is failure else self._why(error)
                raise self._failed(record.step, why) from (error.__cause__ or error)
            self.newest = record.step
            # The step is complete. What can't be deleted now is tried again after the next save.
            with contextlib.suppress(OSError):
                self._discard_old(keep | {record.step})

        by_first("checkpoint/complete", complete, timeout_s=_TIMEOUT_S)

    def _complete(self, record: Manifest, parts: Sequence[Mapping[str, tuple[int, str]]]) -> None:
        folder = self.path(record.step)
        for path in (folder, *folder.rglob("*/")):
            files.sync(path)
        written = {name: found for part in parts for name, found in sorted(part.items())}
        manifest.write_manifest(folder, dataclasses.replace(record, files=written))
        files.sync(self.folder)
        step_folder.finish(folder)

    def _discard_old(self, keep: set[int]) -> None:
        steps = self._steps()
        keep = keep | set(steps[-self._num_recent :]) | set(self._ranked()[: self._num_best])
        for old in set(steps) - keep:
            self._discard(old)

    def _discard(self, step: int) -> None:
        step_folder.remove(self.path(step))

    def _lost(self) -> list[int]:
        paths = step_folder.numbered(self.folder)
        return [int(path.name) for path in paths if step_folder.has_lost_manifest(path)]

    def _steps(self) -> list[int]:
        names = [path.parent.name for path in self.folder.glob(f"*/{MANIFEST}")]
        steps = sorted(int(name) for name in names if name.isdigit())
        self.newest = max(steps, default=None)
        return steps

    def _ranked(self) -> list[int]:
        scores = {}
        for step in self._steps():
            with contextlib.suppress(errors.CheckpointError):  # damaged, or deleted while we look
                scores[step] = self._manifest(step).score
        scored = [step for step, score in scores.items() if score is not None and score == score]
        return sorted(scored, key=lambda step: (-self._sign * scores[step], step))

    def _manifest(self, step: int) -> Manifest:
        try:
            return manifest.read_manifest(self.path(step))
        except FileNotFoundError:
            if step_folder.has_lost_manifest(path := self.path(step)):
                raise manifest.damaged(step, path / MANIFEST) from None
            there = ", ".join(map(str, self._steps())) or "none"
            why = f"no checkpoint of step {step} in {self.folder} (there are: {there})"
            raise errors.CheckpointError(why) from None

    def check_files(self, step: int) -> None:
        """Raise DamagedError if a step isn't whole; each process looks at a part of it."""
        found, index, count = self.manifest(step), hosts.index(), hosts.count()
        together(
            "checkpoints/check",
            lambda: manifest.check_files(self.path(step), found, part=index, num_parts=count),
            timeout_s=_TIMEOUT_S,
        )
        self._whole[step] = found

    def _set_aside(self, damaged: Mapping[int, str], whole: int) -> list[str]:
        lines = []
        for step, why in damaged.items():
            try:
                aside = step_folder.set_aside(self.path(step))
            except OSError as error:
                raise errors.CheckpointError(
                    f"{why}; it can't be renamed: {first_line(error)}"
                ) from error
            lines.append(f"{why}; it is kept as {aside.name}, and step {whole} is taken instead")
        return lines

    def _why(self, error: Exception) -> str:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or re.search(
            r"no space|disk quota|RESOURCE_EXHAUSTED", str(error), re.IGNORECASE
        )
        if not full:
            return first_line(error)
        free = files.free_bytes(self.folder)
        return first_line(error) if free is None else f"the disk is full ({free:,} bytes are free)"

    def _failed(self, step: int, why: str) -> errors.CheckpointError:
        latest = max(self._steps(), default=None)
        last = "there is no earlier one" if latest is None else f"that of step {latest} is unharmed"
        return errors.CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {why}; {last}"
        )

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / f"{step:08d}"
