"""Makes the pictures of the dashboard and of the terminal in docs/images, from real runs.

    python scripts/screenshots.py RUN [RUN ...] [--out docs/images]

RUN is the output_dir of a run; the first one is shown in the views of one run. `make test-browser`
installs Playwright; a Chromium has to be there.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.text import Text

RLSYS = str(Path(sys.executable).parent / "rlsys")
ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
DESK, PHONE = (1280, 800), (390, 844)
COLORS = 128
"""Of a picture: charts need few, and a third of the bytes is left."""
MOST_BYTES = 200_000
TERMINAL_COLUMNS = 110
VIEWS: dict[str, tuple[str, tuple[int, int], str]] = {
    "overview": ("overview?smooth=0.6", DESK, "light"),
    "completions": ("completions?{run}", DESK, "light"),
    "completion": ("completions?{run}&row={row}&color=logprob", DESK, "dark"),
    "history": ("completions?{run}&split=eval&row={held_out}", DESK, "light"),
    "time": ("time?{run}", DESK, "light"),
    "health": ("health?{run}", DESK, "dark"),
    "phone": ("overview?smooth=0.6", PHONE, "dark"),
}
"""Picture -> state of the page, size, colours."""
ASK = "address => fetch(address).then((answer) => answer.json())"
TELLING = "where=reward>=2&limit=1"
"""A completion that got all of its rewards."""
READY = "main .chart canvas, main .row, main .lanes canvas, main .log"


def main() -> None:
    """Make all pictures; raises if one is too large."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    args = parser.parse_args()
    executable = next(filter(None, map(shutil.which, CHROMIUM)))
    with _dashboard(args.runs) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name, view in VIEWS.items():
            _picture(browser, url, args, name, *view)
        browser.close()
    first = args.runs[0].resolve()
    where = first.parent.parent
    shown = str(first.relative_to(where))
    _terminal(args.out / "terminal_completions.svg", where, "completions", shown, "--limit", "1")
    _terminal(args.out / "terminal_runs.svg", where, "runs", first.parent.name)


@contextmanager
def _dashboard(runs: list[Path]) -> Iterator[str]:
    words = [RLSYS, "dashboard", *map(str, runs)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found, "rlsys dashboard printed no address"
            yield found[0]
        finally:
            process.terminate()


def _picture(
    browser: Browser,
    url: str,
    args: argparse.Namespace,
    name: str,
    state: str,
    size: tuple[int, int],
    scheme: str,
) -> None:
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, locale="en-GB"
    )
    page = context.new_page()
    page.goto(url)
    known = page.evaluate(ASK, "/api/runs")
    first = next(run["id"] for run in known if run["path"] == str(args.runs[0].resolve()))
    rows = {
        split: page.evaluate(ASK, f"/api/runs/{first}/completions?split={split}&{TELLING}")
        for split in ("train", "eval")
    }
    ids = {split: found["rows"][0]["id"] for split, found in rows.items()}
    state = state.format(run=f"run={first}", row=ids["train"], held_out=ids["eval"])
    page.goto(f"{url}#/{state}")
    page.locator(READY).first.wait_for()
    page.wait_for_timeout(3000)
    target = args.out / f"dashboard_{name}.png"
    page.screenshot(path=target)
    context.close()
    Image.open(target).convert("RGB").quantize(COLORS).save(target, optimize=True)
    size_now = target.stat().st_size
    print(f"{target}: {size_now:,} bytes")
    if size_now > MOST_BYTES:
        raise SystemExit(f"{target} has {size_now:,} bytes, more than {MOST_BYTES:,}")


def _terminal(target: Path, where: Path, *words: str) -> None:
    """What a command prints, called in a folder, as a picture of a terminal."""
    size = {"COLUMNS": str(TERMINAL_COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    printed = subprocess.run(
        [RLSYS, *words],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | size,
        cwd=where,
    ).stdout
    console = Console(record=True, width=TERMINAL_COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(printed))
    console.save_svg(str(target), title=f"rlsys {' '.join(words)}")
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
