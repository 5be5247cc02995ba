"""What is known of a checkpoint beside its arrays, and whether its files are what was written.

The manifest is written last. It holds the size and SHA-256 of every file, and its own.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxnets import errors
from jaxnets.train import files
from jaxnets.train.mesh import path_of
from jaxnets.typing import PyTree
from jaxnets.version import __version__

MANIFEST = "manifest.json"
FORMAT = 2  # in 1, large files too were digested whole


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without reading its arrays.

    Attributes:
        step: the number of steps applied.
        score: of the monitored metric, where this step was evaluated.
        arrays: "dtype[shape]" of each leaf of the state, by path.
        files: size in bytes and `files.digest` of each file, by path in the step's folder.
        extra: what the caller saved beside the state.
        versions: of the libraries that wrote it.
    """

    step: int
    score: float | None
    arrays: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    extra: Mapping[str, Any]
    versions: Mapping[str, str]


def describe(tree: PyTree) -> dict[str, str]:
    """The "dtype[shape]" of each leaf, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def versions() -> dict[str, str]:
    """The versions that a manifest names."""
    return {"jaxnets": __version__, "jax": jax.__version__}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the step in a folder.

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if it isn't what was written.
        CheckpointError: if it can't be read, or a newer version has written it.
    """
    path = folder / MANIFEST
    try:
        sealed = json.loads(path.read_bytes())
        content = sealed["content"]
        if sealed["sha256"] != _seal(content):
            raise ValueError("digest")
        if (written := content.pop("format")) > FORMAT:
            raise errors.CheckpointError(
                f"the checkpoint in {folder} was written by a newer jaxnets "
                f"({content.get('versions', {}).get('jaxnets', 'unknown')}; this is {__version__}): "
                "update this one"
            )
        if written < 1:
            raise ValueError("format")
        return Manifest(**content)
    except errors.CheckpointError:
        raise
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged(int(folder.name), path) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with which the step in a folder is complete."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    text = json.dumps({"content": content, "sha256": _seal(content)}, indent=1)
    files.write_atomically(folder / MANIFEST, text)


def seal_files(folder: Path, paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Make sure that files are on the disk; their sizes and digests, by path in a folder."""
    paths = sorted(paths)
    with concurrent.futures.ThreadPoolExecutor(2, "digest") as pool:
        digests = pool.map(files.digest, paths)  # while the disk works
        for path in paths:
            files.sync(path)
        names = [path.relative_to(folder).as_posix() for path in paths]
        found = [(path.stat().st_size, digest) for path, digest in zip(paths, digests, strict=True)]
    return dict(zip(names, found, strict=True))


def check_files(folder: Path, manifest: Manifest, *, part: int = 0, num_parts: int = 1) -> None:
    """Make sure that the files of a step are what was written.

    Args:
        folder: of the step.
        manifest: which says so.
        part: which part of the files, of `num_parts` of about equal size, to look at.
        num_parts: 1 for all files.

    Raises:
        DamagedError: if one isn't.
        CheckpointError: if one can't be read, or the step has been deleted meanwhile.
    """
    names = sorted(manifest.files, key=lambda name: (manifest.files[name][0], name))
    for name in names[part::num_parts]:
        path = folder / name
        size, digest = manifest.files[name]
        try:
            is_whole = path.is_file() and path.stat().st_size == size and files.has_digest(path, digest)
        except FileNotFoundError:
            is_whole = False
        except OSError as error:
            if error.errno != errno.EIO:
                raise _unreadable(path, error) from error
            is_whole = False
        if not is_whole:
            check_is_there(folder, manifest.step)
            raise damaged(manifest.step, path)


def check_is_there(folder: Path, step: int) -> None:
    """Make sure that a step wasn't deleted while it was read.

    Raises:
        CheckpointError: if it was.
    """
    if not (folder / MANIFEST).exists():
        raise errors.CheckpointError(
            f"the checkpoint of step {step} was deleted while it was read; a newer one is there: "
            "try again"
        )


def damaged(step: int, path: Path) -> errors.DamagedError:
    """The error for a file that isn't what was written, or isn't there."""
    how = "is not what was written" if path.exists() else "is missing"
    return errors.DamagedError(f"the checkpoint of step {step} is damaged: {path} {how}")


def _unreadable(path: Path, error: OSError) -> errors.CheckpointError:
    return errors.CheckpointError(f"{path} can't be read: {errors.first_line(error)}")


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
