"""Takes docs/assets/report.png and report-dark.png, the pictures of a report in the README, with Chromium.

wsm-ds report TUNE
python docs/screenshot.py TUNE/report.html
"""

import argparse
import base64
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "docs/assets"
WIDTH, HEIGHT = 1000, 1180
"""The top of the page: what it says first, and the first picture."""


def main() -> None:
    """Parses the command line and writes both pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, help="report.html")
    page = parser.parse_args().page.resolve()
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import chromium

    clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
    with chromium() as browser:
        for scheme, name in (("light", "report.png"), ("dark", "report-dark.png")):
            browser.open(page, width=WIDTH, height=HEIGHT, scheme=scheme)
            data = browser.cdp("Page.captureScreenshot", clip=clip)["data"]
            (ASSETS / name).write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    main()
