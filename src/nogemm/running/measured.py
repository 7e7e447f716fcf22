"""How every measurement runs, a command's or a script's: with progress, and with its result kept while it grows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nogemm.running.partial import Keep, Record, exit_code, sigterm_interrupts
from nogemm.running.progress import progress

Note = Callable[[str], None]


def measured(
    kind: str | None,
    path: Path | None,
    work: Callable[[Note, Keep], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure: progress while it runs, its result shown and written; return the result.

    Args:
        kind: of the result.
        path: of its --json file.
        work: gets `note` and `keep`, and returns the result.
        show: prints it; also what there is of one that was stopped.
    Raises:
        SystemExit: with 130 or 143, when Ctrl-C or SIGTERM stopped it; what was measured is shown and written then.
            Before a failure is raised it is written.
    """
    record = Record(path, kind)
    try:
        with sigterm_interrupts(), progress.watching():
            result = work(progress, record.keep)
    except KeyboardInterrupt as stop:
        end_early(record, stop, show)
    except Exception as error:
        record.stopped(error)
        raise
    show(result)
    record.done(result)
    return result


def end_early(record: Record, stop: KeyboardInterrupt, show: Callable[[dict[str, Any]], None]) -> Any:
    """Show and write what an interrupted command has measured, and exit."""
    found = record.stopped(stop)
    if found is not None:
        show(found)
    where = f"; {record.path} holds what was measured" if found is not None and record.path is not None else ""
    print(f"nogemm: {record.reason(stop)}{where}", file=sys.stderr)
    raise SystemExit(exit_code(stop)) from None
