"""Open the report in a real browser: light and dark, wide and on a phone; nothing may overflow or load from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sample_results import demo_result, layer_result, report

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
LIGHT, DARK = 1, 0


def main() -> None:
    """Take the screenshots into build/, and fail on what a reader would stumble over."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("browser: no browser was found; install the package chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report(folder, demo_result(), layer_result())
        page = folder / "report.html"
        for theme, width in ((LIGHT, 1200), (DARK, 1200), (LIGHT, 500), (DARK, 500)):
            picture = screenshot(browser, page, folder / f"{theme}{width}", theme, width)
            check_picture(picture, theme)
        check_width(browser, page, folder)
    print("browser: the report holds together, light and dark, wide and narrow")


def screenshot(browser: str, page: Path, profile: Path, theme: int, width: int) -> Path:
    """Return a picture of the page."""
    picture = Path("build") / f"report-{'light' if theme == LIGHT else 'dark'}-{width}.png"
    picture.parent.mkdir(exist_ok=True)
    options = [f"--user-data-dir={profile}", f"--window-size={width},1600", f"--screenshot={picture.resolve()}"]
    call(browser, page, [*options, f"--blink-settings=preferredColorScheme={theme}"])
    return picture


def check_picture(picture: Path, theme: int) -> None:
    """Fail unless the page has its theme's ground and more than a few colours on it."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    ground = int(np.median(pixels))
    if (ground > 128) != (theme == LIGHT):
        sys.exit(f"browser: {picture} has the wrong theme (median brightness {ground})")
    if len(np.unique(pixels.reshape(-1, 3), axis=0)) < 50:
        sys.exit(f"browser: {picture} is nearly blank")


def check_width(browser: str, page: Path, folder: Path) -> None:
    """Fail if the page is wider than a phone: only tables scroll, each in its own box."""
    probe = "<script>document.title = 'w' + document.documentElement.scrollWidth</script></body>"
    probing = folder / "probe.html"
    probing.write_text(page.read_text().replace("</body>", probe))
    options = [f"--user-data-dir={folder / 'probe'}", "--window-size=500,900", "--dump-dom"]
    found = re.search(r"<title>w(\d+)</title>", call(browser, probing, options))
    if found is None or int(found.group(1)) > 500:
        sys.exit(f"browser: the page is {found.group(1) if found else '?'} wide on a screen of 500")


def call(browser: str, page: Path, options: list[str]) -> str:
    """Run the browser once and return what it printed."""
    command = [browser, *FLAGS, *options, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        sys.exit(f"browser: it ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


if __name__ == "__main__":
    main()
