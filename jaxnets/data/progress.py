"""How far a download is: a bar on a terminal, two lines elsewhere, or the caller's own function."""

import contextlib
import sys
from collections.abc import Callable, Iterator

ProgressFn = Callable[[int, int], None]
Progress = bool | ProgressFn | None


@contextlib.contextmanager
def reporting(progress: Progress, what: str) -> Iterator[ProgressFn]:
    """A function to call with (bytes done, bytes in all) while something is fetched.

    Args:
        progress: True shows it on stderr; False or None shows nothing; a function is called.
        what: what is fetched, for the display.

    Yields:
        The function. Nothing is shown before its first call.
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(what) as report:
            yield report
    else:
        with _lines(what) as report:
            yield report


@contextlib.contextmanager
def _bar(what: str) -> Iterator[ProgressFn]:
    from rich import progress as rich_progress  # here: most runs download nothing
    from rich.console import Console

    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task(what, total=None, start=False)

    def report(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
            bar.start_task(task)
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()


@contextlib.contextmanager
def _lines(what: str) -> Iterator[ProgressFn]:
    started = False

    def report(done: int, total: int) -> None:
        nonlocal started
        if not started:
            started = True
            print(f"downloading {what} ({total / 1e6:.1f} MB)", file=sys.stderr, flush=True)

    yield report
    if started:
        print(f"downloaded {what}", file=sys.stderr, flush=True)
