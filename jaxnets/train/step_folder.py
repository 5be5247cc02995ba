"""The folder of a step: whatever a kill leaves of it, at whichever moment, says what it is.

A folder that isn't whole yet, or isn't any more, holds an empty file `unfinished`. It comes before
everything else and goes after the manifest is there; when a step is deleted it comes back before the
manifest goes, and goes last.

| manifest | `unfinished` | other files | what it is |
| --- | --- | --- | --- |
| there | there or not | | a step |
| gone | there | | a save, or a deletion, that was killed: it may be removed |
| gone | gone | none | the same |
| gone | gone | some | a step that has lost its manifest: never removed |
"""

from pathlib import Path

from jaxnets.train import files
from jaxnets.train.manifest import MANIFEST

UNFINISHED = "unfinished"
_DAMAGED = ".damaged"


def make(folder: Path) -> None:
    """Make the folder of a step, in which nothing is yet; the one above it is there."""
    folder.mkdir()
    (folder / UNFINISHED).touch()


def finish(folder: Path) -> None:
    """Say that a step is whole; its manifest is there, and on the disk.

    If a power cut brings the file back, the step counts all the same, by its manifest.
    """
    (folder / UNFINISHED).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete the folder of a step, whole or not."""
    marker, record = folder / UNFINISHED, folder / MANIFEST
    marker.touch()
    files.sync(folder)  # else a power cut might leave neither this file nor the manifest
    record.unlink(missing_ok=True)
    files.sync(folder)  # nor bring the manifest back over files that are gone
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            files.remove_tree(path)
        elif path != marker:
            path.unlink()
    files.sync(folder)  # nor leave files without the marker
    marker.unlink()
    folder.rmdir()


def numbered(folder: Path) -> list[Path]:
    """The folders in a folder that are named as those of steps are, in order."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def is_left_over(folder: Path) -> bool:
    """Whether that is what a killed save or deletion left."""
    return not (folder / MANIFEST).exists() and (
        (folder / UNFINISHED).exists() or not _has_files(folder)
    )


def has_lost_manifest(folder: Path) -> bool:
    """Whether there was a step, of which the manifest is gone."""
    names = (MANIFEST, UNFINISHED, MANIFEST)  # and again: a save may have ended in between
    return not any((folder / name).exists() for name in names) and _has_files(folder)


def set_aside(folder: Path) -> Path:
    """Rename a damaged step to 00000012.damaged, or with a number after that; the new folder.

    Raises:
        OSError: if it can't be renamed.
    """
    aside = folder.with_name(folder.name + _DAMAGED)
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}{_DAMAGED}.{number}")
    files.move(folder, aside)
    return aside


def those_set_aside(folder: Path) -> list[str]:
    """The names of all that was set aside in a folder."""
    return sorted(path.name for path in folder.glob(f"*{_DAMAGED}*"))


def _has_files(folder: Path) -> bool:
    return any(not path.is_dir() for path in folder.rglob("*"))
