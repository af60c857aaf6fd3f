"""demo.py in a real browser: a digit drawn with the mouse, a seven asked for. Needs Gradio, Playwright, Chromium."""

import http.client
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.parse
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import demo
import evaluate
from engine.errors import DataError
from measures.reference import load_reference
from photos import read

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SEVEN = [(70, 80), (260, 80), (210, 160), (150, 290)]  # corners of the drawn 7, in pixels of the canvas


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """demo.py with the shipped weights on a free port, from another working directory; its address.

    After the tests, Ctrl-C ends it on one line, without a traceback of theirs, and no drawing stays.
    """
    pytest.importorskip("gradio", reason="pip install -r requirements-demo.txt")
    weights = ["weights/cnn.pt", "weights/mlp.pt", "weights/cgan.pt"]
    command = [sys.executable, str(ROOT / "demo.py"), *weights, "--port", "0"]
    folder = tmp_path_factory.mktemp("elsewhere")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, "TMPDIR": str(folder)}, **pipes)
    process.folder = folder
    process.address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline()).group()
    assert int(process.address.rpartition(":")[2]) not in range(7860, 7960), "two demos may want one of these at once"
    yield process
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines() == ["demo.py: interrupted"]
    assert not list(folder.iterdir())


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
    source = page.locator(f"#{name} img").get_attribute("src", timeout=60_000)
    content = page.request.get(source).body()
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("L")))[4::8, 4::8] / 255


def drawing_of(page):
    """The file of the drawing that the page has sent to demo.py: as a layer, and on its background."""
    for path in [path for response in page.sent for path in response.json()]:
        with suppress(DataError):
            read(path)
            return path
    pytest.fail("the page has sent no drawing")


def test_a_digit_drawn_with_the_mouse_is_classified_as_by_evaluate(page, capsys):
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


def test_on_a_narrow_screen_the_parts_of_the_page_do_not_overlap(page):
    page.set_viewport_size({"width": 400, "height": 950})
    page.wait_for_timeout(1000)
    boxes = [page.locator(name).bounding_box() for name in ("#canvas", "#seen", "#answer-0", "#answer-1")]
    for upper, lower in itertools.pairwise(boxes):
        assert upper["y"] + upper["height"] <= lower["y"]
        assert lower["x"] + lower["width"] <= 400


def ask(process, path, data=None, **headers):
    """The status and the content of the answer of demo.py."""
    connection = http.client.HTTPConnection(process.address.removeprefix("http://"), timeout=60)
    connection.request("GET" if data is None else "POST", path, data, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def upload(process, content, **headers):
    head = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    form = head.encode() + content + b"\r\n--x--\r\n"
    headers["Content-Type"] = "multipart/form-data; boundary=x"
    return ask(process, "/gradio_api/upload", form, **headers)


def test_a_page_that_is_closed_while_it_sends_a_drawing_leaves_no_traceback(process):
    """Which the end of `process` would find."""
    connection = http.client.HTTPConnection(process.address.removeprefix("http://"))
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"--x\r\n")
    connection.close()
    ask(process, "/")


def test_other_websites_and_other_users_have_no_access(process):
    assert ask(process, "/")[0] == ask(process, "/", Origin=process.address)[0] == 200
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        assert ask(process, "/", **headers)[0] == upload(process, b"x", **headers)[0] == 403
    assert upload(process, bytes(6_000_000))[0] == 413
    status, answer = upload(process, b"small")
    path = Path(json.loads(answer)[0])
    assert (status, path.read_bytes()) == (200, b"small")
    private = process.folder / path.relative_to(process.folder).parts[0]
    assert private.stat().st_mode & 0o777 == 0o700


def bomb():
    content = io.BytesIO()
    Image.new("1", (12_500, 12_500)).save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([None, 1, 0, 7], "a box is empty, or no digit is chosen"),
        ([2**64, 1, 0, 7], "seed: Value 18446744073709551616 is greater than maximum value 2147483647"),
        ([0, -1, 0, 7], "seed at the end of the walk: Value -1 is less than minimum value 0"),
        ([0, 1, 0, None], "no digit is chosen"),
        ([0, 1, None, 7], "walk from one z to the other: "),
        ([0, 1, 0, 12], "is not in the list of choices"),
        (bomb(), "draw: Image size (156250000 pixels) exceeds"),
        (b"text", "draw: cannot identify image file"),
    ],
)
def test_what_cannot_be_drawn_is_a_message_in_the_page(process, values, words):
    """And no traceback: the fixture reads the errors."""
    if isinstance(values, bytes):
        path = json.loads(upload(process, values)[1])[0]
        values = [{"background": None, "layers": [], "composite": {"path": path, "meta": {"_type": "gradio.FileData"}}}]
    steps = json.loads(ask(process, "/config")[1])["dependencies"]
    number = next(
        step["id"] for step in steps if step["targets"][0][1] == "change" and len(step["inputs"]) == len(values)
    )
    call = json.dumps({"data": values, "fn_index": number, "session_hash": words}).encode()
    assert ask(process, "/gradio_api/queue/join", call, **{"Content-Type": "application/json"})[0] == 200
    events = ask(process, "/gradio_api/queue/data?" + urllib.parse.urlencode({"session_hash": words}))[1].decode()
    assert words in next(line for line in events.splitlines() if "process_completed" in line)


def test_the_page_asks_no_other_machine(page):
    elsewhere = [url for url in page.asked if not url.startswith(("http://127.0.0.1", "data:", "blob:"))]
    assert elsewhere == []


def drawing(*rows):
    """Vertical strokes on white, each at another height."""
    page = Image.new("L", (400, 300), 255)
    for i, row in enumerate(rows):
        page.paste(0, (50 + 120 * i, row, 70 + 120 * i, row + 100))
    return {"composite": page}


def test_all_digits_of_a_drawing_are_answered_and_none_is_said():
    models = {"a": evaluate.load_model("weights/mlp.pt"), "b": evaluate.load_model("weights/mlp.pt")}
    seen, *answers = demo.read_drawing(models, drawing(50, 55))
    assert seen.shape == (224, 448)
    assert answers[0].count("<b>a: 11</b>") == 2
    assert answers[1].count("class=") == 20
    seen, *answers = demo.read_drawing(models, drawing(50))
    assert seen.shape == (224, 224)
    assert answers[0].startswith("<b>a: 1</b>")
    for nothing, words in ((drawing(), "shows no digit"), (drawing(10, 180), "row"), (None, "draw a digit"),
                           ({"composite": None}, "draw a digit")):  # fmt: skip
        seen, *answers = demo.read_drawing(models, nothing)
        assert seen is None
        assert all(words in answer for answer in answers)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    for installed, found in ((None, "import of gradio halted"), (SimpleNamespace(__version__="5.50.0"), r"5\.50\.0")):
        monkeypatch.setitem(sys.modules, "gradio", installed)
        with pytest.raises(demo.UserError, match=rf"{found}.*pip install -r requirements-demo\.txt"):
            demo.main([])
