"""Run the demo: `python -m nogemm.demo [--folder runs/demo] [--restart]`."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from nogemm.hardware.waiting import sleep_while_waiting


def main() -> None:
    """Run every step that is left, write the report, print the closing table."""
    parser = argparse.ArgumentParser(prog="./run demo", description="Convert, distil, measure and report a real model.")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything goes [runs/demo]")
    parser.add_argument("--restart", action="store_true", help="forget what earlier calls did")
    args = parser.parse_args()
    if args.restart:
        shutil.rmtree(args.folder, ignore_errors=True)
    start = time.monotonic()
    print(
        f"nogemm demo: about 12 minutes, less training on a slow machine; everything goes to {args.folder}", flush=True
    )
    from nogemm.bench.report.write import write_report
    from nogemm.demo.chain import recorded_searches, run_demo
    from nogemm.demo.table import print_result
    from nogemm.errors import NogemmError
    from nogemm.running.partial import exit_code, sigterm_interrupts

    try:
        with sigterm_interrupts():
            recorded = Path("benchmarks/results")
            result = run_demo(args.folder, recorded)
            searches = recorded_searches(recorded)[:1]
            report = write_report([args.folder / "result.json", *searches], args.folder / "report.html")
    except KeyboardInterrupt as stop:
        print("\nstopped; `./run demo` goes on from here", file=sys.stderr)
        raise SystemExit(exit_code(stop)) from None
    except NogemmError as error:
        print(f"demo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print_result(result, report, time.monotonic() - start)


if __name__ == "__main__":
    sleep_while_waiting()
    main()
