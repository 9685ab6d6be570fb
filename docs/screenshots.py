"""Takes the picture of the page of answers that README and docs/trust.md show, light and dark.

    python -m docs.screenshots SMOLLM2

SMOLLM2 is a folder that ``pipeline smollm2`` wrote. The job is jobs/leases.yaml, the page that of ``pipeline show
--html``. In a headless Chromium, some quotations are opened, as a reader does by a click. The text on the page is
kept in the picture's metadata, so that a test can compare it with docs/figures/leases.json.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import sync_playwright

from docs.pictures import PICTURES

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "jobs" / "leases.yaml"
OPENED = {"flat.txt": "rent", "house.txt": "deposit", "room.txt": "dog"}
WIDTH, HEIGHT, SCALE, COLOURS = 920, 2000, 2, 16  # in CSS pixels; pixels of the picture for each; of its palette


def write_page(model: Path, folder: Path) -> Path:
    """Run the job in a folder and return its page of answers."""
    page = folder / "leases.html"
    places = {"model": model, "cache.dir": folder / "cache", "output.path": folder / "leases.parquet"}
    settings = [word for key, value in places.items() for word in ("--set", f"{key}={value}")]
    for words in (("run", JOB, "--quiet"), ("show", JOB, "--html", page)):
        command = [sys.executable, "-m", "pipeline.cli", *map(str, words), *settings]
        subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return page


def take_pictures(page: Path) -> None:
    """Write the page, with the quotations of one query opened, as two PNG files."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for name, scheme in (("answers", "light"), ("answers-dark", "dark")):
            tab = browser.new_page(
                color_scheme=scheme, viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE
            )
            tab.goto(page.as_uri())
            for document, query in OPENED.items():
                column = tab.locator("thead th").all_inner_texts().index(query) + 1
                row = tab.locator("tbody tr").filter(has_text=document)
                row.locator(f"td:nth-child({column}) summary").click()
            area = {"x": 0, "y": 0, "width": WIDTH, "height": tab.locator("body").bounding_box()["height"]}
            picture = Image.open(io.BytesIO(tab.screenshot(clip=area)))
            about = PngInfo()
            about.add_itxt("Description", tab.locator("table").text_content() or "")
            picture.quantize(COLOURS).save(PICTURES / f"{name}.png", optimize=True, pnginfo=about)
        browser.close()


def main() -> None:
    """Write the pictures."""
    (model,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        take_pictures(write_page(Path(model).resolve(), Path(folder)))


if __name__ == "__main__":
    main()
