"""Checkpoints that are whole or not there: the only place that knows Orbax.

A step is a folder with the state, as Orbax writes it, and a manifest, which is written last: to a
temporary name, synced, renamed. It holds the size and SHA-256 of every file. A folder without one is
what a killed save left behind; a folder whose files differ from it is damaged, and is never read.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets import errors
from jaxnets.train.health import fresh_health
from jaxnets.train.sharding import path_of
from jaxnets.train.state import TrainState
from jaxnets.typing import PyTree
from jaxnets.version import __version__

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without reading its arrays.

    Attributes:
        step: the number of steps applied.
        score: of the monitored metric, where this step was evaluated.
        arrays: "dtype[shape]" of each leaf of the state, by path.
        files: size in bytes and SHA-256 of each file, by path in the step's folder.
        extra: what the caller saved beside the state.
        versions: of the libraries that wrote it.
    """

    step: int
    score: float | None
    arrays: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    extra: Mapping[str, Any]
    versions: Mapping[str, str]


class Checkpoints:
    """The checkpoints of one run: the latest one and the best ones are kept.

    Saving returns as soon as the state is copied; files, digests and the manifest are written by a
    thread. Older checkpoints are deleted only after a newer one is complete. Use it as a context, or
    call `wait`, so that the last save is complete.

    Args:
        folder: where; made when the first step is saved.
        maximize: whether a greater score is the better one.
        num_best: how many of the best are kept, at least 1.
    """

    def __init__(self, folder: Path | str, *, maximize: bool = True, num_best: int = 1):
        if num_best < 1:
            raise errors.ConfigError(f"at least the best checkpoint is kept, not the best {num_best}")
        self.folder = Path(folder).absolute()
        self._sign = 1 if maximize else -1
        self._num_best = num_best
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def steps(self) -> list[int]:
        """The steps that have a manifest, in order."""
        return sorted(int(p.parent.name) for p in self.folder.glob(f"*/{MANIFEST}") if _is_step(p))

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
        scores = {}
        for step in self.steps():
            with contextlib.suppress(errors.CheckpointError):  # damaged, or deleted while we look
                scores[step] = self.manifest(step).score
        scored = [step for step, score in scores.items() if score is not None and score == score]
        return sorted(scored, key=lambda step: (-self._sign * scores[step], step))

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        path = self._folder_of(step) / MANIFEST
        try:
            sealed = json.loads(path.read_bytes())
            content = sealed["content"]
            if sealed["sha256"] != _seal(content) or content.pop("format") != _FORMAT:
                raise ValueError("digest")
            return Manifest(**content)
        except FileNotFoundError:
            there = ", ".join(map(str, self.steps())) or "none"
            raise errors.CheckpointError(
                f"no checkpoint of step {step} in {self.folder} (there are: {there})"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise self._damaged(step, MANIFEST) from None

    def clean(self) -> list[str]:
        """Remove what interrupted saves left behind; the names of what was removed."""
        removed = []
        for path in sorted(self.folder.glob("*")):
            if path.name.isdigit() and path.is_dir() and not (path / MANIFEST).exists():
                shutil.rmtree(path)
                removed.append(path.name)
        return removed

    def discard(self, step: int) -> None:
        """Delete a step."""
        # The manifest goes first, so that a kill in between leaves nothing half-valid.
        (self._folder_of(step) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self._folder_of(step))

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
            keep: steps to keep beside this one and the best ones.

        Raises:
            CheckpointError: if the earlier save failed.
        """
        self.wait()
        step = int(state.step)
        if (self._folder_of(step) / MANIFEST).exists():
            return
        # A NumPy view of a CPU array is the array's own memory, which the next step writes over.
        copy = jax.block_until_ready(jax.tree.map(jnp.copy, _as_dict(state)))
        arrays = _describe(copy)
        _orbax()  # here, not in the thread: importing is for the main one
        future = self._executor.submit(
            self._write, step, copy, arrays, score, dict(extra or {}), set(keep)
        )
        self._pending = (step, future)

    def check(self) -> None:
        """Raise the error of a save that has failed since; it doesn't wait."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being saved.

        Raises:
            CheckpointError: if the save failed.
        """
        if not self._pending:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            if step not in self.steps():
                shutil.rmtree(self._folder_of(step), ignore_errors=True)
            raise self._failed(step, error) from error

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
            CheckpointError: if a file is damaged, or the state is another model's or optimizer's.
        """
        manifest = self.manifest(step)
        wants_health = abstract.health is not None
        has_health = any(name.startswith("health/") for name in manifest.arrays)
        sharding = abstract.guard.sharding
        if has_health and not wants_health:
            health = jax.eval_shape(fresh_health)
            health = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), health
            )
            abstract = dataclasses.replace(abstract, health=health)
        elif wants_health and not has_health:
            abstract = dataclasses.replace(abstract, health=None)
        wanted = _describe(_as_dict(abstract))
        for name in sorted(wanted.keys() | manifest.arrays.keys()):
            found, expected = manifest.arrays.get(name), wanted.get(name)
            if found != expected:
                raise errors.CheckpointError(
                    f"the checkpoint in {self._folder_of(step)} is of another model or optimizer: "
                    f"{name} is {found or 'missing'} there and {expected or 'missing'} here"
                )
        self._verify(step, manifest)
        try:
            restored = _orbax().load(str(self._folder_of(step) / "state"), _as_dict(abstract))
        except Exception as error:
            raise errors.CheckpointError(
                f"the checkpoint in {self._folder_of(step)} can't be read: {_first_line(error)}"
            ) from error
        if _describe(restored) != wanted:  # Orbax reads in threads, which know no context of JAX's
            raise errors.CheckpointError(
                "the checkpoint holds 64-bit arrays: enable them for the whole process, JAX_ENABLE_X64=1"
            )
        # Fresh from Orbax arrays can't be donated, and the first step would hold the state twice.
        state = TrainState(**jax.tree.map(jnp.copy, restored))
        if has_health != wants_health:
            health = jax.jit(fresh_health, out_shardings=sharding)() if wants_health else None
            state = dataclasses.replace(state, health=health)
        return state, manifest

    def _write(
        self,
        step: int,
        arrays: PyTree,
        described: Mapping[str, str],
        score: float | None,
        extra: Mapping[str, Any],
        keep: set[int],
    ) -> None:
        folder = self._folder_of(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _orbax().save(str(folder / "state"), arrays)
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            _sync(path)
            files[path.relative_to(folder).as_posix()] = (path.stat().st_size, _digest(path))
        for path in folder.rglob("*/"):
            _sync(path)
        content = {
            "format": _FORMAT,
            "step": step,
            "score": score,
            "arrays": described,
            "files": files,
            "extra": extra,
            "versions": {"jaxnets": __version__, "jax": jax.__version__},
        }
        write_atomically(
            folder / MANIFEST, json.dumps({"content": content, "sha256": _seal(content)}, indent=1)
        )
        _sync(self.folder)
        # The step is complete. What can't be deleted now is tried again after the next save.
        with contextlib.suppress(OSError):
            for old in set(self.steps()) - keep - {step, *self.ranked()[: self._num_best]}:
                self.discard(old)

    def _verify(self, step: int, manifest: Manifest) -> None:
        folder = self._folder_of(step)
        for name, (size, digest) in manifest.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size or _digest(path) != digest:
                if not (folder / MANIFEST).exists():
                    raise errors.CheckpointError(
                        f"the checkpoint of step {step} was deleted while it was read; a newer one is "
                        "there: try again"
                    )
                raise self._damaged(step, name)

    def _damaged(self, step: int, name: str) -> errors.CheckpointError:
        return errors.CheckpointError(
            f"the checkpoint of step {step} is damaged: {self._folder_of(step) / name} is not what "
            "was written; delete that step's folder to go on from an earlier one, if there is one"
        )

    def _failed(self, step: int, error: Exception) -> errors.CheckpointError:
        why = _first_line(error)
        full = getattr(error, "errno", None) == errno.ENOSPC or re.search(
            r"no space|disk quota|RESOURCE_EXHAUSTED", str(error), re.IGNORECASE
        )
        if full:
            free = shutil.disk_usage(_existing(self.folder)).free
            why = f"the disk is full ({free:,} bytes are free)"
        latest = self.latest()
        last = "there is no earlier one" if latest is None else f"that of step {latest} is unharmed"
        return errors.CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {why}; {last}"
        )

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"{step:08d}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or the next start after a kill, sees all of it or the old one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _orbax() -> Any:
    """Orbax, imported when it is first needed: a new run's first step need not wait for it."""
    from orbax.checkpoint import v1

    return v1


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _describe(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _is_step(manifest: Path) -> bool:
    return manifest.parent.name.isdigit()


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
