"""Draw a digit and watch networks classify it; pick a digit and watch a generator write it. In the browser, locally.

pip install -r requirements-demo.txt
python demo.py                                    # the networks of weights/
python demo.py runs/mlp-mnist weights/cnn.pt      # your own, side by side
"""

import engine  # noqa: F401, I001 (before torch, so that Ctrl-C during its import prints one line)
import html
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from engine import flags
from engine.errors import UserError, run_script
from engine.provenance import ROOT
from evaluate import read_number, read_picture
from measures.samples import is_conditional, sample_between
from measures.trained import load_model

CANVAS = 336  # pixels; twelve for each of the network's 28
PICK_THE_BRUSH = (
    "() => { const wait = setInterval(() => { const brush = document.querySelector('#canvas [aria-label=Brush]');"
    " if (brush) { brush.click(); clearInterval(wait); } }, 100); }"
)


def get_args_parser() -> flags.ArgumentParser:
    parser = flags.ArgumentParser("demo.py", __doc__)
    what = "run folders, or files of weights/ (default: all files of weights/)"
    parser.add_argument("run", metavar="RUN", type=flags.path, nargs="*", help=what)
    parser.add_argument("--port", type=flags.number(int, 0, 65535), default=7860, help="local port; 0: any free one")
    return parser


def read_drawing(classifiers: dict[str, Any], drawing: Any) -> list[Any]:
    """The digits as the last network sees them, side by side, and the number that each reads, as HTML.

    drawing: the canvas, or None. If a network cannot read it, the reason stands in place of the number.
    """
    seen, shown = None, []
    for name, model in classifiers.items():
        try:
            if not (drawing and drawing["composite"]):
                raise UserError("draw a digit")
            reading = read_picture(model, drawing["composite"])
        except UserError as error:
            shown.append(f"<b>{html.escape(name)}</b><p>{html.escape(str(error).partition(';')[0])}</p>")
            continue
        rows, number = read_number(model, reading)
        shown.append("".join(bars(f"{name}: {number}", model, row) for row in rows.tolist()))
        seen = enlarge(torch.cat([*reading.images[:, 0]], dim=1) / 255)
    return [seen, *shown]


def bars(title: str, model: Any, probabilities: list[float]) -> str:
    """A bar for each class; the highest is highlighted."""
    rows = f"<b>{html.escape(title)}</b>"
    for name, p in zip(model.options["classes"], probabilities):
        colour = "#e8590c" if p == max(probabilities) else "#4a7fb5"
        bar = f'<div style="flex:1"><div style="background:{colour};height:1em;width:{100 * p:.2f}%"></div></div>'
        cells = f'<span style="min-width:1em">{html.escape(name)}</span>{bar}<span class="p">{p:.2%}</span>'
        rows += f'<div style="display:flex;gap:.5em;align-items:center">{cells}</div>'
    return rows


def enlarge(image: torch.Tensor) -> Any:
    """An image [H, W] with pixels from 0 to 1 as uint8, eight times as large."""
    return (image * 255).round().to(torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()


def say_in_page(gr: Any, component: Any) -> None:
    """If the component holds what it cannot read, show an error in the page instead of printing a traceback."""
    read = component.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return read(payload)
        except Exception as error:
            words = f"{component.label}: {getattr(error, 'message', error)}"
            raise gr.Error(words, print_exception=False) from error

    component.preprocess = preprocess


def add_canvas(gr: Any, page: Any, classifiers: dict[str, Any]) -> None:
    gr.Markdown("## Draw a digit")
    with gr.Row():
        with gr.Column(scale=0, min_width=CANVAS + 100):
            brush = gr.Brush(default_size=24, colors=["#000000"], color_mode="fixed")
            size = dict(canvas_size=(CANVAS, CANVAS), width=CANVAS + 100, height=CANVAS + 100)
            canvas = gr.Sketchpad(brush=brush, type="pil", layers=False, label="draw", elem_id="canvas", **size)
        with gr.Column(scale=0, min_width=260):
            seen = gr.Image(label="what the networks see", elem_id="seen", width=260, height=260)
        answers = []
        for i, name in enumerate(classifiers):
            with gr.Column(min_width=220):
                answers.append(gr.HTML(f"<b>{html.escape(name)}</b>", elem_id=f"answer-{i}"))
    say_in_page(gr, canvas)
    page.load(None, js=PICK_THE_BRUSH)
    canvas.change(partial(read_drawing, classifiers), canvas, [seen, *answers], show_progress="hidden")


def add_generator(gr: Any, page: Any, i: int, name: str, model: Any) -> None:
    gr.Markdown(f"## Samples of {name}")
    choices = [(each, number) for number, each in enumerate(model.options["classes"])]
    shown = dict(value=min(7, len(choices) - 1), visible=is_conditional(model), elem_id=f"digit-{i}")
    with gr.Row():
        with gr.Column():
            number = gr.Radio(choices, label="digit", **shown)
            whole = dict(precision=0, minimum=0, maximum=2**31 - 1)
            seed = gr.Number(0, label="seed", elem_id=f"seed-{i}", **whole)
            other = gr.Number(1, label="seed at the end of the walk", **whole)
            t = gr.Slider(0, 1, 0, step=0.01, label="walk from one z to the other")
        image = gr.Image(label="sample", elem_id=f"sample-{i}", width=260, height=260)
    controls = [seed, other, t, number]
    for control in controls:
        say_in_page(gr, control)

    def draw(*values: Any) -> Any:
        if None in values:
            raise gr.Error("a box is empty, or no digit is chosen", print_exception=False)
        return enlarge(sample_between(model, *values))

    for trigger in (page.load, *(control.change for control in controls)):
        trigger(draw, controls, image, show_progress="hidden")


def build_page(gr: Any, models: dict[str, Any]) -> Any:
    generators = {run: model for run, model in models.items() if hasattr(model, "sample")}
    classifiers = {run: model for run, model in models.items() if run not in generators}
    with gr.Blocks(title="Deep Learning Bootcamp") as page:
        if classifiers:
            add_canvas(gr, page, classifiers)
        for i, (name, model) in enumerate(generators.items()):
            add_generator(gr, page, i, name, model)
    return page


def for_this_machine(app: Any) -> Any:
    """ASGI middleware that refuses what the page of another website sends."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect
        from starlette.responses import PlainTextResponse

        headers = dict(scope.get("headers", ()))
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        good = host.partition(":")[0] in ("", "127.0.0.1", "localhost") and origin in ("", f"http://{host}")
        with suppress(ClientDisconnect):  # the page was closed while it sent a drawing
            await (app if good else PlainTextResponse("only for this machine", 403))(scope, receive, send)

    return answer


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as folder:  # of this process alone
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)
        serve(args.run, args.port)


def serve(runs: Sequence[str], port: int) -> None:
    for name in ("NO_PROXY", "no_proxy"):  # Gradio calls its own page
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    try:
        import gradio as gr

        if int(gr.__version__.partition(".")[0]) < 6:
            raise ImportError(f"this is Gradio {gr.__version__}")
        from PIL import Image
        from starlette.middleware import Middleware
    except ImportError as error:
        raise UserError(f"demo.py needs Gradio 6 ({error}); run: pip install -r requirements-demo.txt") from error
    Image.MAX_IMAGE_PIXELS = 1_000_000  # half of what Pillow refuses to open
    runs = runs or sorted(f"weights/{path.name}" for path in (ROOT / "weights").glob("*.pt"))
    page = build_page(gr, {run: load_model(run) for run in runs})
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from elsewhere
    port = port or free_port()
    where: dict[str, Any] = dict(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True)
    limits: dict[str, Any] = dict(max_file_size="5mb", app_kwargs={"middleware": [Middleware(for_this_machine)]})
    try:
        _, url, _ = page.launch(**where, **limits, share=False, quiet=True, theme=theme)
    except OSError as error:
        raise UserError(f"port {port} is taken or forbidden; choose another, or a free one with --port 0") from error
    print(f"open {url} in a browser; Ctrl-C stops the page")
    try:
        while True:
            time.sleep(1)  # on Windows, Ctrl-C does not interrupt the wait for an Event
    finally:
        page.close(verbose=False)


def free_port() -> int:
    """A port that the system chooses. Gradio tries 7860 and so on, which another demo may take at the same moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


if __name__ == "__main__":
    run_script(main)
