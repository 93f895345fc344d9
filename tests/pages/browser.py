"""A headless browser for the pages that this package writes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def start(page: Path, *options: str, fragment: str = "", size: tuple[int, int] = (1280, 900)) -> str:
    """Open a page from the disk without a network and return the output of Chromium. Skips where there is none."""
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    words = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'chromium'}",
        f"--window-size={size[0]},{size[1]}", *options, f"{page.as_uri()}{fragment}",
    ]  # fmt: skip
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def dump(page: Path, script: str = "", **options: object) -> str:
    """Return the page after its own script, and then ``script``, have run."""
    copy = page.with_name("probe.html")
    probe = f"""<script>window.addEventListener("load", async () => {{ {script} }});</script>"""  # before its policy
    # The page of a phone stands in a frame, as Chromium's own windows are 500 pixels wide at least.
    notes = """<script>
      const note = (name, value) => parent === window ? document.documentElement.setAttribute("probe-" + name, value)
        : parent.postMessage([name, value], "*");
      window.onerror = (what) => note("error", what);
      window.onunhandledrejection = (event) => note("error", event.reason);
    </script>"""
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("<head>", f"<head>{notes}{probe}", 1), "utf-8")
    width, height = options.get("size", (1280, 900))  # type: ignore[misc]
    if width < 500:
        frame = f'<iframe src="probe.html" style="border: 0; width: {width}px; height: {height}px"></iframe>'
        listen = "document.documentElement.setAttribute('probe-' + event.data[0], event.data[1])"
        copy = page.with_name("phone.html")
        copy.write_text(f"<head></head><script>onmessage = (event) => {listen};</script>{frame}")
    found = start(copy, "--dump-dom", **options)  # type: ignore[arg-type]
    assert "probe-error" not in found.split("<head>")[0], found[:500]
    return found


def probed(dom: str, name: str) -> float:
    """Return a number that ``script`` of ``dump`` noted."""
    match = re.search(rf'probe-{name}="([^"]*)"', dom)
    assert match, dom[:300]
    return float(match.group(1))


def screenshot(page: Path, **options: object) -> Path:
    """Return a picture of the page's first screen."""
    path = page.with_name("screen.png")
    start(page, f"--screenshot={path}", **options)  # type: ignore[arg-type]
    return path


def assert_self_contained(page: Path) -> None:
    """Make sure that a page refers to nothing outside itself."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    references = re.findall(r"""(?:src|href|poster|data)\s*=\s*["']([^"']*)""", text)
    assert references, "nothing is inlined"
    assert all(reference.startswith(("data:", "#")) for reference in references), references
    assert not re.search(r"url\(\s*['\"]?(?!data:|#)|@import|fetch\(|XMLHttpRequest", text)
