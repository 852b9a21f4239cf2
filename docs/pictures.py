"""Take `docs/report.png`, the picture of a run's report: `python docs/pictures.py RUN`. Needs Chromium."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1280, 1400
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def photograph(page: Path, picture: Path) -> None:
    """The top of a page, as a desktop browser shows it in light mode."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no chromium on the PATH")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={picture}", page.resolve().as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)


def shrink(picture: Path) -> None:
    """Store the picture with 256 colours: the page has few."""
    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(picture, optimize=True)


def main() -> None:
    """Write the picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory with its report.html")
    picture = Path(__file__).with_name("report.png")
    photograph(parser.parse_args().run / "report.html", picture)
    shrink(picture)


if __name__ == "__main__":
    main()
