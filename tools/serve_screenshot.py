"""Pictures of the server's page for the documentation, by Chromium.

python tools/serve_screenshot.py BUNDLE docs/serving-page.png docs/serving-phone.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


def drawing(page: Page, share: float) -> None:
    """Draw some samples, and return on the way or at the end."""
    page.wait_for_selector("#classes button")
    for name in ("2", "5", "8"):
        page.click(f"#classes button >> text={name}")
    page.fill("#n", "8")
    page.fill("#seed", "7")
    page.fill("#steps", "50")
    page.click("#draw")
    done = "document.getElementById('bar').value / document.getElementById('bar').max"
    while page.evaluate(done) < share:
        page.wait_for_timeout(10)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("phone", type=Path)
    given = parser.parse_args()
    command = [sys.executable, "-m", "admtrt", "serve", str(given.bundle), "--port", "0", "--json"]
    server = subprocess.Popen([*command, "--drain-grace", "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for file, size, share in ((given.page, (1080, 680), 0.7), (given.phone, (390, 844), 1.0)):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.goto(url)
            drawing(page, share)
            page.screenshot(path=file, full_page=size[0] < 500)
            page.close()
        browser.close()
    server.send_signal(signal.SIGTERM)
    server.wait()


if __name__ == "__main__":
    main()
