"""A disk whose power may be cut at any moment, and what is on it then.

Nothing survives for sure but what was synced: of a file the content that it had then, of a folder the
names. Of the rest any part may. So it is enough to look at the disk itself around each sync, and after
each change of a name: whoever wrote what lies there, in Python or in C++, it counts as lost until this
process has synced it.
"""

import os
import threading
from typing import NamedTuple

_CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir")
Content = dict[str, int] | bytes  # names and inodes of a folder; what is in a file


class Moment(NamedTuple):
    """What was synced and what was there, by inode, and the last thing that was promised."""

    synced: dict[int, Content]
    there: dict[int, Content]
    promised: int | None


class Disk:
    """Watches a folder, which itself is safe, from now on; `moments` are those of possible cuts."""

    def __init__(self, root, monkeypatch):
        self.root, self.moments, self.promised = root, [], None
        self._synced: dict[int, Content] = {}
        self._held: dict[int, int] = {}  # open, so that no inode gets another's number
        self._lock = threading.RLock()
        self._look()
        self._patch = monkeypatch

        def sync(descriptor):  # which need not wait for the real disk
            with self._lock:
                there = self._look()
                number = os.fstat(descriptor).st_ino
                if number in there:
                    self._synced[number] = there[number]
                self._look()

        monkeypatch.setattr(os, "fsync", sync)
        for name in _CHANGES:
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def promise(self, step):
        with self._lock:
            self.promised = step
            self._look()

    def _watched(self, change):
        def watched(*args, **kwargs):
            with self._lock:
                change(*args, **kwargs)
                self._look()

        return watched

    def _look(self):
        there: dict[int, Content] = {}
        self._walk(self.root, there)
        moment = Moment(dict(self._synced), there, self.promised)
        if not self.moments or moment != self.moments[-1]:
            self.moments.append(moment)
        return there

    def _walk(self, path, there):
        try:
            number = os.stat(path).st_ino
            if number not in self._held:
                self._held[number] = os.open(path, os.O_RDONLY)
            if path.is_dir():
                names = {entry.name: entry.inode() for entry in os.scandir(path)}
                for name in names:
                    self._walk(path / name, there)
                there[number] = {name: i for name, i in names.items() if i in there}
            else:
                there[number] = path.read_bytes()
        except FileNotFoundError:  # another thread was faster
            pass

    def stop(self):
        """See no more; what is synced from now on is so at once."""
        self._patch.undo()
        self._patch.setattr(os, "fsync", lambda descriptor: None)
        while self._held:
            os.close(self._held.popitem()[1])

    def left(self, moment, survives):
        """What a cut at a moment leaves, as nested names; `survives(synced, there)` of each inode."""

        def of(number):
            kinds = [x[number] for x in (moment.there, moment.synced) if number in x]
            empty = {} if kinds and isinstance(kinds[0], dict) else b""
            synced = moment.synced.get(number, empty)
            content = survives(synced, moment.there.get(number, synced))
            if isinstance(content, bytes):
                return content
            return {name: of(child) for name, child in content.items()}

        return of(os.stat(self.root).st_ino)


def put(left, path):
    """Write what is left to another place."""
    if isinstance(left, bytes):
        path.write_bytes(left)
        return
    path.mkdir()
    for name, content in left.items():
        put(content, path / name)


def nothing_else(synced, there):
    """Only what was synced."""
    return synced


def names(synced, there):
    """All names are there already, and of the contents what was synced."""
    return there if isinstance(there, dict) else synced


def all_but(name):
    """The same, but one that is not synced is lost wherever it is."""

    def survives(synced, there):
        if isinstance(there, dict):
            return {each: x for each, x in there.items() if each != name or each in synced}
        return synced

    return survives


def zeros(synced, there):
    """The same, and files have their length, as after a journal was replayed."""
    if isinstance(there, dict):
        return there
    begin = synced if there.startswith(synced) else b""
    return begin + bytes(len(there) - len(begin))


def any_part(rng):
    """Some names, some contents."""

    def survives(synced, there):
        if isinstance(there, dict):
            found = {**synced, **there} if rng.random() < 0.5 else {**there, **synced}
            return {
                name: number
                for name, number in found.items()
                if (name in synced and name in there) or rng.random() < 0.5
            }
        if synced == there:
            return synced
        begin = len(synced) if there.startswith(synced) else 0
        part = there[: rng.integers(begin, len(there) + 1)]
        return (synced, there, zeros(synced, there), part)[rng.integers(4)]

    return survives
