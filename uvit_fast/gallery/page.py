"""The gallery's page: Gradio's controls around a `Session`, and a server that serves pictures and nothing else.

Pictures travel inside the page as data: URIs, so no route needs to read a file, and those that would are closed.
"""

import base64
import contextlib
import html
import os
import random
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from uvit_fast.gallery.recipe import Recipe, checked, plain_png
from uvit_fast.gallery.session import MOST, Session, View
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.extras import missing
from uvit_fast.runtime.files import file_name

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry; read when Gradio is imported
try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
except ImportError:
    raise missing("the gallery", "gradio", "gallery") from None

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_UPLOAD = 50 * 2**20  # bytes
OPEN = {  # first parts of the paths that the page needs
    "", "config", "theme.css", "static", "assets", "svelte", "favicon.ico", "manifest.json", "robots.txt",
    "queue", "heartbeat", "cancel", "upload", "upload_progress", "startup-events", "app_id",
}  # fmt: skip
CSS = """
.pictures {display: flex; flex-wrap: wrap; gap: 10px}
.pictures figure {margin: 0; font-size: 13px; text-align: center}
.pictures img {image-rendering: pixelated; border-radius: 4px}
.said {margin-bottom: 8px; font-size: 13px; opacity: .8}
footer {display: none !important}
"""


class Closed:
    """ASGI middleware that answers 404 for everything the page does not need."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix("/gradio_api").lstrip("/")
        if scope["type"] == "http" and path.split("/")[0] not in OPEN:
            await PlainTextResponse("not found", 404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


@contextlib.contextmanager
def serving(session: Session, host: str, port: int) -> Iterator[tuple["gr.Blocks", str]]:
    """Serve the page while the context is open, and yield its address.

    Args:
        host: the address to listen on; on the loopback, the page answers only to the loopback's names.
        port: 0: a free one.

    Raises:
        UserError: the address is not available.
    """
    middleware = [Middleware(Closed)]
    if host in LOOPBACK:  # a site whose name is made to resolve here is not answered
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"]))
    with tempfile.TemporaryDirectory(prefix="uvit-fast-gallery-") as uploads, _environment("GRADIO_TEMP_DIR", uploads):
        page = build(session)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port or _free(host),
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                pwa=False,
                footer_links=[],
                max_file_size=LARGEST_UPLOAD,
                css=CSS,
                app_kwargs={"middleware": middleware},
            )
        except OSError:
            raise UserError(f"--host {host} --port {port}: cannot be listened at; expected another --port") from None
        try:
            yield page, url
        finally:
            page.close(verbose=False)


def serve(session: Session, host: str, port: int) -> None:
    """Serve the page until Ctrl-C, and say where.

    Raises:
        UserError: as `serving`.
    """
    with serving(session, host, port) as (page, url):
        print(f"gallery: {url} (Ctrl-C ends it)", flush=True)
        page.server.thread.join()


def build(session: Session) -> "gr.Blocks":
    """Return the page of a session."""
    names = session.names
    first = session.choices(names[0])
    with gr.Blocks(
        title="uvit-fast gallery", analytics_enabled=False, fill_width=True, delete_cache=(600, 600)
    ) as page:
        gr.Markdown("## U-ViT gallery")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                left = _controls(names, first.start.checkpoint, session, "")
                classes = gr.Dropdown(
                    first.classes,
                    value=[label for _, label in first.classes[:4]],
                    multiselect=True,
                    label="Classes",
                    visible=bool(first.classes),
                    elem_id="classes",
                )
                prompt = gr.Textbox(
                    first.start.prompt or "", label="Prompt", visible=first.text, max_length=10_000, elem_id="prompt"
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, elem_id="seed")
                    num = gr.Number(1, label="Pictures per class", precision=0, minimum=1, maximum=MOST, elem_id="num")
                another = gr.Button("Another seed", size="sm")
                file = gr.UploadButton(
                    "Load a saved picture", type="binary", file_types=[".png"], size="sm", elem_id="load"
                )
            with gr.Column(scale=3):
                with gr.Tab("Draw", id="draw"):
                    draw = gr.Button("Draw", variant="primary", elem_id="draw-button")
                    drawn = gr.HTML(elem_id="drawn")
                with gr.Tab("Side by side", id="side"):
                    gr.Markdown("The settings at the left, beside these, from the same noise:")
                    with gr.Row():
                        right = _controls(names, names[-1], session, "-b")
                    side = gr.Button("Draw both", variant="primary", elem_id="side-button")
                    with gr.Row():
                        with gr.Column():
                            side_a = gr.HTML(elem_id="side-a")
                        with gr.Column():
                            side_b = gr.HTML(elem_id="side-b")
                with gr.Tab("Walk", id="walk"):
                    with gr.Row():
                        to_seed = gr.Number(
                            1, label="To seed", precision=0, minimum=0, maximum=2**53 - 1, elem_id="to-seed"
                        )
                        stations = gr.Slider(2, 32, 8, step=1, label="Pictures", elem_id="stations")
                    walk = gr.Button("Walk from the seed to this one", variant="primary", elem_id="walk-button")
                    walked = gr.HTML(elem_id="walked")
                stop = gr.Button("Stop", size="sm", elem_id="stop")

        what = [classes, prompt, seed, num]

        def recipes(settings: Sequence, labels: list[int], prompt: str, seed: int, num: int) -> list[Recipe]:
            choices = session.choices(settings[0])
            base = checked(
                choices.start,
                **dict(zip(("cfg_scale", "steps", "sampler", "precision"), settings[1:])),
                seed=seed,
                prompt=prompt if choices.text else None,
            )
            return session.recipes(base, labels if choices.classes else None, num)

        def on_draw(*values: Any) -> Iterator[str]:
            with _told():
                wanted = recipes(values[:5], *values[5:9])
                for view in session.draw(wanted):
                    yield pictures(session, view, wanted)

        def on_side(*values: Any) -> Iterator[tuple[str, str]]:
            with _told():
                sides = [recipes(values[5 * i : 5 * i + 5], *values[10:14]) for i in range(2)]
                for a, b in session.side_by_side(*sides):
                    yield pictures(session, a, sides[0]) if a else "", pictures(session, b, sides[1]) if b else ""

        def on_walk(*values: Any) -> Iterator[str]:
            with _told():
                labels, prompt, seed, _, to_seed, stations = values[5:]
                wanted = recipes(values[:5], labels, prompt, seed, 1)[0].walk(to_seed, stations)
                for view in session.draw(wanted):
                    yield pictures(session, view, wanted)

        def on_load(data: bytes) -> Iterator[dict[Any, Any]]:
            with _told():
                recipe, notes = session.load(data)
                choices = session.choices(recipe.checkpoint)
                for note in notes:
                    gr.Warning(html.escape(note))
                settings = _settings(session, recipe) | {
                    classes: gr.update(choices=choices.classes, value=[recipe.label], visible=bool(choices.classes)),
                    prompt: gr.update(value=recipe.prompt or "", visible=choices.text),
                    seed: recipe.seed,
                    num: 1,
                    to_seed: recipe.to_seed or 0,
                }
                settings = {left[key] if isinstance(key, str) else key: value for key, value in settings.items()}
                for view in session.draw([recipe]):
                    yield settings | {drawn: pictures(session, view, [recipe])}
                    settings = {}

        def on_checkpoint(name: str, of: dict[str, Any], own: bool) -> dict[Any, Any]:
            choices = session.choices(name)
            settings = {of[key]: value for key, value in _settings(session, choices.start).items()}
            if own:
                settings |= {
                    classes: gr.update(
                        choices=choices.classes,
                        value=[label for _, label in choices.classes[:4]],
                        visible=bool(choices.classes),
                    ),
                    prompt: gr.update(value=choices.start.prompt or "", visible=choices.text),
                }
            return settings

        hidden = {"api_visibility": "private"}
        running = {**hidden, "show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "session"}
        a, b = list(left.values()), list(right.values())
        begun = [
            draw.click(on_draw, [*a, *what], drawn, **running),
            side.click(on_side, [*a, *b, *what], [side_a, side_b], **running),
            walk.click(on_walk, [*a, *what, to_seed, stations], walked, **running),
            file.upload(on_load, file, [*a, *what, to_seed, drawn], **running),
        ]
        stop.click(None, None, None, cancels=begun, **hidden)
        another.click(lambda: random.randrange(2**31), None, seed, **hidden)
        for own, of in ((True, left), (False, right)):
            of["checkpoint"].input(
                lambda name, of=of, own=own: on_checkpoint(name, of, own),
                of["checkpoint"],
                list(of.values()) + [classes, prompt] * own,
                **hidden,
            )
    return page


def pictures(session: Session, view: View, recipes: list[Recipe]) -> str:
    """Return a view as HTML: unfinished pictures as they are, finished ones with their recipe inside, ready to be
    saved.
    """
    names = {label: name for name, label in session.choices(recipes[0].checkpoint).classes}
    finished = view.milliseconds is not None
    figures = []
    for image, recipe in zip(view.images, recipes):
        what = recipe.prompt if recipe.label is None else names.get(recipe.label, str(recipe.label))
        where = f"seed {recipe.seed}" if recipe.to_seed is None else f"{recipe.position:.2f} to seed {recipe.to_seed}"
        width = image.shape[1] * max(1, round(144 / image.shape[1]))
        data = (
            "data:image/png;base64,"
            + base64.b64encode(session.png(image, recipe) if finished else plain_png(image)).decode()
        )
        picture = f'<img src="{data}" width="{width}" alt="{html.escape(what or where)}">'
        if finished:
            name = "_".join(file_name(part) for part in (recipe.checkpoint, what or "", where) if part)
            picture = (
                f'<a href="{data}" download="{html.escape(name)}.png" title="save, with its settings">{picture}</a>'
            )
        said = html.escape(", ".join(filter(None, (what, where))))
        figures.append(f'<figure>{picture}<figcaption style="max-width:{width}px">{said}</figcaption></figure>')
    took = f"{view.done} of {view.steps} evaluations"
    if finished:
        how = (
            "a replayed CUDA graph" if view.replayed else "uncaptured" if session.device.type == "cuda" else "on a CPU"
        )
        count = "one picture" if len(recipes) == 1 else f"{len(recipes)} pictures"
        took = f"{view.milliseconds:,.1f} ms: {count}, {view.steps} evaluations, {how}"
    state = "finished" if finished else "running"
    return f'<div class="said {state}">{took}</div><div class="pictures">{"".join(figures)}</div>'


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable that Gradio reads, while the context is open."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Show a user's mistake as a line in the page."""
    try:
        yield
    except (UserError, ImportError) as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None


def _free(host: str) -> int:
    """Return a free port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return one.getsockname()[1]


def _controls(names: list[str], name: str, session: Session, suffix: str) -> dict[str, Any]:
    """Return the settings of one loop, by the names of `_settings`."""
    choices = session.choices(name)
    start = choices.start
    checkpoint = gr.Dropdown(
        names, value=name, label="Checkpoint", visible=len(names) > 1, elem_id=f"checkpoint{suffix}"
    )
    return {
        "checkpoint": checkpoint,
        "cfg_scale": gr.Slider(
            1, 10, start.cfg_scale, step=0.1, visible=choices.guided, elem_id=f"scale{suffix}",
            label="Guidance scale", info="1 + s; 1: none",
        ),
        "steps": gr.Slider(
            1, max(250, start.steps), start.steps, step=1, elem_id=f"steps{suffix}",
            label="Steps", info="network evaluations",
        ),
        "sampler": gr.Dropdown(choices.samplers, value=start.sampler, label="Sampler", elem_id=f"sampler{suffix}"),
        "precision": gr.Dropdown(
            choices.precisions, value=start.precision, label="Precision", elem_id=f"precision{suffix}"
        ),
    }  # fmt: skip


def _settings(session: Session, recipe: Recipe) -> dict[str, Any]:
    """Return what the controls show for a recipe."""
    choices = session.choices(recipe.checkpoint)
    return {
        "checkpoint": recipe.checkpoint,
        "cfg_scale": gr.update(value=recipe.cfg_scale, maximum=max(10, recipe.cfg_scale), visible=choices.guided),
        "steps": gr.update(value=recipe.steps, maximum=max(250, recipe.steps)),
        "sampler": gr.update(value=recipe.sampler, choices=choices.samplers),
        "precision": gr.update(value=recipe.precision, choices=choices.precisions),
    }
