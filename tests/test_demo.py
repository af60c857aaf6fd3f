"""demo.py in a real browser: a digit drawn with the mouse, a seven asked for. Needs Gradio, Playwright, Chromium."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from helpers import ROOT

import demo
import evaluate
from engine.errors import DataError
from measures.reference import load_reference
from photos import read_photo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SEVEN = [(70, 80), (260, 80), (210, 160), (150, 290)]  # corners of the drawn 7, in pixels of the canvas


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """demo.py with the shipped weights on a free port, from another working directory; its address."""
    pytest.importorskip("gradio", reason="pip install -r requirements-demo.txt")
    weights = ["weights/cnn.pt", "weights/mlp.pt", "weights/cgan.pt"]
    command = [sys.executable, str(ROOT / "demo.py"), *weights, "--port", "0"]
    folder = tmp_path_factory.mktemp("elsewhere")
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline()).group()
    yield process
    process.kill()


@pytest.fixture(scope="module")
def page(process):
    """The page in Chromium, which reaches this machine alone."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 950})
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.sent = []
        page.on("response", lambda response: page.sent.append(response) if "/upload" in response.url else None)
        page.route(lambda url: "//127.0.0.1" not in url, lambda route: route.abort())  # as with the network off
        page.goto(process.address)
        page.locator("canvas").first.wait_for(timeout=60_000)
        yield page
        browser.close()


def image_in(page, name):
    """The pixels of an image of the page, [28, 28] from 0 to 1, once it is there."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    source = page.locator(f"#{name} img").get_attribute("src", timeout=60_000)
    content = page.request.get(source).body()
    return torch.from_numpy(np.asarray(Image.open(BytesIO(content)).convert("L")).copy())[4::8, 4::8] / 255


def drawing_of(page):
    """The file of the drawing that the page has sent to demo.py: as a layer, and on its background."""
    for path in [path for response in page.sent for path in response.json()]:
        with suppress(DataError):
            read_photo(path)
            return path
    pytest.fail("the page has sent no drawing")


def test_a_digit_drawn_with_the_mouse_is_classified_as_by_evaluate(page, tmp_path, capsys, monkeypatch):
    box = page.locator("#canvas canvas").first.bounding_box()
    left, top = (box[start] + (box[size] - demo.CANVAS) / 2 for start, size in (("x", "width"), ("y", "height")))
    page.locator("#canvas [aria-label=Brush].selected, #canvas [aria-label=Brush]").first.wait_for()
    page.wait_for_timeout(1000)  # until the brush is picked
    page.mouse.move(left + SEVEN[0][0], top + SEVEN[0][1])
    page.mouse.down()
    for x, y in SEVEN[1:]:
        page.mouse.move(left + x, top + y, steps=10)
    page.mouse.up()
    page.locator("#answer-0 .p").first.wait_for(timeout=60_000)
    shown = [float(cell.rstrip("%")) / 100 for cell in page.locator("#answer-0 .p").all_inner_texts()]
    assert image_in(page, "seen").max() > 0.9
    if "SCREENSHOT" in os.environ:  # for assets/demo.png
        page.screenshot(path=os.environ["SCREENSHOT"], full_page=True)

    monkeypatch.chdir(tmp_path)
    evaluate.main([str(ROOT / "weights" / "cnn.pt"), "--image", drawing_of(page)])
    line = capsys.readouterr().out.splitlines()[1]
    assert [float(value) / 100 for value in re.findall(r"([\d.]+)%", line)] == pytest.approx(shown, abs=1e-4)
    assert sum(shown) == pytest.approx(1, abs=1e-3)
    assert max(range(10), key=shown.__getitem__) == 7


def test_the_seven_that_is_asked_for_is_classified_as_a_seven(page):
    page.locator("#digit-0 label", has_text="7").click()
    digits = []
    for seed in range(5):
        before = page.locator("#sample-0 img").get_attribute("src", timeout=60_000)
        page.locator("#seed-0 input").fill(str(seed + 1))
        page.locator("#seed-0 input").press("Tab")
        page.wait_for_function("before => document.querySelector('#sample-0 img')?.src != before", arg=before)
        digits.append(load_reference("cpu").read(image_in(page, "sample-0").view(1, 1, 28, 28))[1].item())
    assert digits == [7] * 5


def test_the_page_asks_no_other_machine(page):
    elsewhere = [url for url in page.asked if not url.startswith(("http://127.0.0.1", "data:", "blob:"))]
    assert elsewhere == []


def test_ctrl_c_stops_it_in_one_line(process):
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines() == ["demo.py: interrupted"]


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(demo.UserError, match=r"pip install -r requirements-demo\.txt"):
        demo.main([])
