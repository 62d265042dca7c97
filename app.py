# What Gradio's components take is not typed so that a checker could follow, and it may not be installed.
# pyright: reportArgumentType=false, reportMissingImports=false, reportCallIssue=false, reportReturnType=false
"""A page in the browser to make sounds with any pipeline of tonefield, and to work on them.

    pip install tonefield[demo]
    python app.py                                             # the models that come with the repository
    python app.py --model outputs/drums --model USER/NAME     # folders, or names on the Hub
    python app.py --host 0.0.0.0 --port 8000                  # for a phone in the same network

Say what you want to hear, and make a sound. Then vary it, mark a part of its picture to have that part made anew,
continue it, close it to a loop; or see what other solvers and fewer steps make of the same noise, and at what cost.
Nothing leaves the machine, and nothing is asked of any other.
"""

import argparse
import base64
import functools
import html
import inspect
import io
import os
import random
import re
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tonefield
from tonefield import inference
from tonefield.command_line import UserError, first_line, make_parser, parse, run
from tonefield.files import write_sound
from tonefield.pipelines import from_flags


# What the page lets one choose; a model shows those that it has a use for.
CONTROLS = (
    "prompt", "class_label", "steps", "solver", "guidance_scale", "negative_prompt", "seconds", "loop", "seed",
)  # fmt: skip
SOLVERS = ("dpmsolver++", "heun", "euler", "rk45", "pc", "event", "analytic", "remdm", "confidence")
PAGE = Path(tonefield.__file__).parent / "page"
ONE_AT_A_TIME = threading.Lock()  # a pipeline remembers things between its steps


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model", action="append", metavar="NAME",
        help="a pipeline, folder or Hub id; may be repeated (default: those that come with the repository)",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="where to listen; 0.0.0.0 lets the whole network in (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, metavar="N", help="(default: the first that is free from 7860 on)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    args = parse(parser, argv)
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port is {args.port}: it must lie between 1 and 65535")
    return args


Tell = Callable[[int, int], Any]  # hears of each step, and of how many there are


# ----- models


@dataclass
class Model:
    """A pipeline, and what of the page it has a use for."""

    name: str
    pipe: Any
    scheduler: Any  # as it was saved
    controls: set[str]
    classes: list[str]
    solvers: list[str]  # its own first
    steps: int
    seconds: float


def names_of_models(given: Sequence[str] | None) -> list[str]:
    if given:
        return list(dict.fromkeys(given))
    names = sorted(os.path.relpath(file.parent) for file in from_flags.PRETRAINED.glob("*/model_index.json"))
    if not names:
        raise UserError(f"There are no models in {from_flags.PRETRAINED}: name one, --model FOLDER or USER/NAME.")
    return names


@functools.lru_cache(maxsize=4)
def open_model(name: str) -> Model:
    pipe = from_flags.load_model(flags(model=name))
    if all(pipe.components.get(part) is None for part in ("mel", "audio_tokenizer")):
        raise UserError(f"--model {name} makes no sound: it has neither a mel nor an audio tokenizer.")
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(pipe.__call__).parameters
    controls = {flag for flag, argument in from_flags.ARGUMENTS.items() if argument in known} | {"seed", "solver"}
    classes = list(pipe.config.get("label2id") or map(str, range(getattr(pipe, "num_classes", 0))))
    reads = pipe.components.get("text_encoder") is not None
    controls -= set() if classes else {"class_label"}
    controls -= set() if reads else {"prompt", "negative_prompt"}
    controls -= set() if classes or reads else {"guidance_scale"}
    window = from_flags.window_seconds(pipe)
    return Model(
        name, pipe, pipe.scheduler, controls, classes, solvers_of(pipe.scheduler),
        (pipe.config.get("card") or {}).get("num_inference_steps") or known["num_inference_steps"].default,
        round(window, 3) if window < 60 else 5.0,
    )  # fmt: skip


def solvers_of(scheduler) -> list[str]:
    """The names of the solvers that a scheduler can be given, its own first."""
    config = scheduler.config
    own = config.get("solver_type") if config.get("solver_type") in SOLVERS else config.get("predictor")
    own = own or {cls: name for name, cls in from_flags.SOLVERS.items()}.get(type(scheduler).__name__)
    found = {own or type(scheduler).__name__: None}
    for name in dict.fromkeys((*SOLVERS, *from_flags.SOLVERS)):
        try:
            from_flags.change_solver(scheduler, name)
            found[name] = None
        except UserError:
            pass
    return list(found)


# ----- sounds


@dataclass
class Take:
    """A sound that was made or given, as the file that one would download."""

    wav: bytes
    name: str
    title: str
    rate: int
    seconds: float
    loops: bool = False
    cost: str = ""
    command: str = ""


def silent(step: int, steps: int) -> None:
    """Tells nobody how far a sound is."""


def flags(**given: Any) -> argparse.Namespace:
    """Flags of `inference.py`."""
    return argparse.Namespace(**{**vars(inference.parse_args([])), **given})


def flags_of(model: Model, wanted: dict[str, Any], **edit: Any) -> argparse.Namespace:
    """The flags that say what the controls say, so far as the model has a use for them."""
    used = {name: wanted.get(name) for name in model.controls.intersection(CONTROLS)}
    given = {name: value for name, value in used.items() if value not in (None, "", False)}
    given["seed"] = int(used["seed"] or 0)
    if not {"prompt", "class_label"} & set(given):
        given.pop("guidance_scale", None)
    if "prompt" not in given or given.get("guidance_scale") == 1:
        given.pop("negative_prompt", None)
    if given.get("solver") == model.solvers[0]:
        del given["solver"]
    if given.get("seconds") == model.seconds or "audio" in edit:
        given.pop("seconds", None)
    if "audio" in edit:
        given.pop("loop", None)
    for name in {"prompt", "class_label"} & set(given):
        given[name] = [given[name]]
    return flags(model=model.name, num_samples=1, **given, **edit)


def command_of(args: argparse.Namespace) -> str:
    """What to type for the same sound."""
    usual, words = vars(flags()), ["python", "inference.py"]
    for name, value in vars(args).items():
        if value == usual[name]:
            continue
        for one in value if isinstance(value, list) else [value]:
            text = f"{one[0]:g}:{one[1]:g}" if isinstance(one, tuple) else str(one)
            words += [f"--{name}"] + ([] if one is True else [text])
    return shlex.join(words)


def make(model: Model, args: argparse.Namespace, tell: Tell = silent) -> Take:
    """One sound, and what it took."""
    pipe, calls = model.pipe, 0
    prompt, label = ((getattr(args, name) or [None])[0] for name in ("prompt", "class_label"))
    sound = from_flags.Sound(0, args.seed, prompt, label)

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    def step_ended(pipe, step: int, timestep, shown: dict) -> dict:
        tell(step + 1, max(pipe.num_timesteps, step + 1))
        return shown

    with ONE_AT_A_TIME:
        scheduler = from_flags.change_solver(model.scheduler, args.solver) if args.solver else model.scheduler
        pipe.register_modules(scheduler=scheduler)
        call = from_flags.make_call(pipe, args, [sound])
        hook = (pipe.components.get("unet") or pipe.components["transformer"]).register_forward_hook(count)
        started = time.perf_counter()
        try:
            waveform = from_flags.make_batch(pipe, call | {"callback_on_step_end": step_ended}, [sound])[0]
        finally:
            hook.remove()
        took = time.perf_counter() - started
    rate = from_flags.sampling_rate_of(pipe)
    word = re.sub(r"\W+", "-", sound.title.lower()).strip("-")[:40]
    cost = f"{calls} network call{'s' * (calls != 1)}, {took:.1f}\N{NO-BREAK SPACE}s"
    return take_of(waveform, rate, f"{word}-{args.seed}.wav", sound.title, bool(args.loop), cost, command_of(args))


def take_of(waveform, rate: int, name: str, title: str, *rest) -> Take:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sound.wav")
        write_sound(file, waveform, rate)
        return Take(file.read_bytes(), name, title, rate, len(waveform) / rate, *rest)


def given_take(model: Model, path: str) -> Take:
    """A sound of the user's own: without the silence around it, and no longer than the model can take."""
    import numpy as np

    from tonefield.data.audio_files import AudioError, read_audio

    rate = from_flags.sampling_rate_of(model.pipe)
    try:
        audio = read_audio(Path(path), rate)
    except (AudioError, OSError) as error:
        raise UserError(f"This sound cannot be used: {first_line(error)}") from None
    loud = np.flatnonzero(np.abs(audio) > 0.02 * np.abs(audio).max())
    if not len(loud):
        raise UserError("This sound is silent.")
    audio = audio[max(0, loud[0] - rate // 20) : loud[-1] + rate // 20]
    longest = len(audio) if "seconds" in model.controls else int(from_flags.window_seconds(model.pipe) * rate)
    return take_of(audio[:longest], rate, "given.wav", "Your sound")


def needed(take: Take | None) -> Take:
    if take is None:
        raise UserError("There is no sound yet: make one first, or bring one of yours.")
    return take


def edit(model: Model, take: Take | None, wanted: dict[str, Any], tell: Tell = silent, **how: Any) -> Take:
    """A sound made from another: with `strength`, `inpaint`, `continue_to` or `loop`."""
    take = needed(take)
    if take.loops and "continue_to" not in how:
        how["loop"] = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, take.name)
        file.write_bytes(take.wav)
        args = flags_of(model, wanted, audio=str(file), **how)
        made = make(model, args, tell)
    made.command = command_of(argparse.Namespace(**{**vars(args), "audio": take.name}))
    return made


def close(model: Model, take: Take | None, wanted: dict[str, Any], tell: Tell = silent) -> Take:
    """The sound as a loop: an eighth of it on either side of the seam is made anew, to fit together."""
    import soundfile

    take = needed(take)
    if not take.loops and "seconds" in model.controls and hasattr(model.pipe, "mel"):
        # its length must be a whole number of what the networks halve
        unit = model.pipe._unit * model.pipe.mel.config.hop_length
        audio, rate = soundfile.read(io.BytesIO(take.wav), dtype="float32")
        if whole := (len(audio) + 1) // unit * unit:
            take = take_of(audio[:whole], rate, take.name, take.title)
    end = take.seconds
    return edit(model, take, wanted, tell, loop=True, inpaint=[(0.0, end / 8), (end * 7 / 8, end)])


def mend_spans(model: Model, take: Take | None, wanted: dict[str, Any], tell: Tell, text: str) -> Take:
    return edit(model, take, wanted, tell, inpaint=read_spans(text, needed(take).seconds))


def lengthen(model: Model, take: Take | None, wanted: dict[str, Any], tell: Tell, seconds: float) -> Take:
    return edit(model, take, wanted, tell, continue_to=needed(take).seconds + seconds)


def read_spans(text: str, seconds: float) -> list[tuple[float, float]]:
    """Spans of seconds, as many as there are; an end beyond the sound's is its end."""
    try:
        spans = [inference.span(part) for part in text.replace(",", " ").split()]
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error)) from None
    if not spans:
        raise UserError("Nothing is marked: drag across the picture first. What you mark is made anew.")
    for start, _ in spans:
        if start >= seconds:
            raise UserError(f"{start:g} s lies beyond the end of the sound, which is {seconds:.2f} s long.")
    return [(start, min(end, seconds)) for start, end in spans]


def compare(
    model: Model, wanted: dict[str, Any], solvers: list[str], steps: list[int], tell: Tell = silent
) -> Iterator[list[Take]]:
    """The same noise through several solvers in several numbers of steps: all sounds so far, after each."""
    if not solvers or not steps:
        raise UserError("Choose at least one solver and one number of steps to compare.")
    takes: list[Take] = []
    for solver in solvers:
        for count in sorted(steps):
            take = make(model, flags_of(model, wanted | {"solver": solver, "steps": count}), tell)
            take.title = f"{solver}, {count} step{'s' * (count != 1)}"
            takes.append(take)
            yield takes


# ----- the page

NOTHING_YET = (
    '<div class="empty">Your sound appears here, with its picture: time from left to right, pitch upwards.</div>'
)


def text_of(text: str) -> str:
    """Text for the page, out of reach of gradio's templates."""
    return re.sub(r"[{}$`\\]", lambda sign: f"&#{ord(sign[0])};", html.escape(text))


def figure_of(take: Take, current: bool = False) -> str:
    """The picture and the player of a sound, with all that they show: nothing is left to be fetched."""
    import numpy as np
    import soundfile

    from tonefield.data.pictures import draw_spectrogram

    def url(kind: str, content: bytes) -> str:
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    waveform, rate = soundfile.read(io.BytesIO(take.wav), dtype="float32")
    picture = io.BytesIO()
    draw_spectrogram(np.atleast_1d(waveform), rate).save(picture, format="png")
    title, sound, more, command = text_of(take.title), url("audio/wav", take.wav), "", ""
    if current:
        more = f'<a download="{text_of(take.name)}" href="{sound}">Download</a>'
    if current and take.command:
        command = f"<details><summary>On the command line</summary><code>{text_of(take.command)}</code></details>"
    ticks = "".join(f"<span>{take.seconds * part / 4:.2f}{' s' * (part == 4)}</span>" for part in range(5))
    return f"""<figure class="take">
        <div class="picture" data-seconds="{take.seconds}">
            <img alt="Spectrogram of {title}" src="{url("image/png", picture.getvalue())}"><i class="line"></i>
        </div>
        <div class="ticks">{ticks}</div>
        <audio controls {"autoplay" * current} {"loop" * take.loops} src="{sound}"></audio>
        <figcaption><b>{title}</b><span>{"loop, " * take.loops}{take.cost}</span>{more}</figcaption>{command}
    </figure>"""


def labels_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Models as they are offered: folders by their own name where that tells them apart."""
    short = [Path(name).resolve().name if os.path.isdir(name) else name for name in names]
    return [(one if short.count(one) == 1 else name, name) for one, name in zip(short, names, strict=True)]


def shown_of(model: Model) -> dict[str, dict[str, Any]]:
    """What the page shows of its controls for a model, and with which values."""
    card = model.pipe.config.get("card") or {}
    own = {
        "prompt": dict(placeholder=card.get("description")),  # says what can be asked for
        "class_label": dict(choices=model.classes, value=model.classes[0] if model.classes else None),
        "steps": dict(value=model.steps, maximum=max(100, 2 * model.steps)),
        "solver": dict(choices=model.solvers, value=model.solvers[0]),
        "seconds": dict(value=model.seconds),
    }
    grid = sorted({max(1, model.steps // 4), max(1, model.steps // 2), model.steps, 2 * model.steps})
    return {control: dict(visible=control in model.controls, **own.get(control, {})) for control in CONTROLS} | {
        "vary": dict(visible="strength" in model.controls),
        "continue": dict(visible="seconds" in model.controls),
        "solvers": dict(choices=model.solvers, value=model.solvers[:2]),
        "counts": dict(choices=grid, value=[grid[0], model.steps]),
    }


def build_page(names: list[str]):
    """The page as gradio knows it. What it does is done by the functions above."""
    import gradio as gr

    def readable(function):
        """What the user can mend is said in the page, in one line."""

        @functools.wraps(function)
        def guarded(*values):
            try:
                yield from function(*values)
            except (UserError, ValueError, TypeError) as error:
                gr.Warning(first_line(error), title="That did not work")  # gr.Error would lie over the sound
                yield gr.skip()

        return guarded

    first = shown_of(open_model(names[0]))
    with gr.Blocks(title="tonefield", analytics_enabled=False) as page:
        history = gr.State([])
        gr.HTML("<h1>tonefield</h1><p>Sound out of noise, on this machine.</p>", elem_classes="intro")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                name = gr.Dropdown(labels_of(names), value=names[0], label="Model", visible=len(names) > 1)
                ask = "What do you want to hear?"
                controls = {
                    "prompt": gr.Textbox(label=ask, lines=2, elem_id="prompt", **first["prompt"]),
                    "class_label": gr.Radio(label=ask, elem_id="classes", **first["class_label"]),
                }
                start = gr.Button("Make a sound", variant="primary", elem_id="make")
                with gr.Accordion("Settings", open=False):
                    about = "1 follows your choice as it was learnt, more exaggerates it"
                    controls |= {
                        "steps": gr.Slider(1, step=1, label="Steps from noise to sound", **first["steps"]),
                        "solver": gr.Dropdown(label="Solver", **first["solver"]),
                        "guidance_scale": gr.Slider(
                            0, 10, 3, step=0.1, label="Guidance", info=about, **first["guidance_scale"]
                        ),
                        "negative_prompt": gr.Textbox(
                            label="What you do not want to hear", **first["negative_prompt"]
                        ),
                        "seconds": gr.Number(label="Seconds", minimum=0.01, **first["seconds"]),
                        "loop": gr.Checkbox(label="Repeats without a click", **first["loop"]),
                        "seed": gr.Number(0, precision=0, minimum=0, label="Seed", **first["seed"]),
                    }
                    anew = gr.Checkbox(True, label="Another seed each time", elem_id="anew")
                given = gr.UploadButton("Begin with a sound of yours", file_types=["audio"])
            with gr.Column(scale=3, min_width=300):
                sound = gr.HTML(NOTHING_YET, elem_id="sound")
                with gr.Column(visible=False) as edits:
                    hint = "Drag across the picture to mark what shall be made anew. Tap to listen from there."
                    gr.HTML(hint, elem_classes="hint")
                    act: dict[str, Any] = dict(elem_classes="act")
                    wide: dict[str, Any] = dict(scale=3, min_width=160)
                    narrow: dict[str, Any] = dict(min_width=120)
                    with gr.Row(**act):
                        spans = gr.Textbox(label="Marked, in seconds", elem_id="spans", **wide)
                        mend = gr.Button("Regenerate", elem_id="mend", **narrow)
                    with gr.Row(**act, **first["vary"]) as strength_row:
                        strength = gr.Slider(0, 1, value=0.4, step=0.05, label="Strength", **wide)
                        vary = gr.Button("Vary", elem_id="vary", **narrow)
                    with gr.Row(**act, **first["continue"]) as further_row:
                        longer = gr.Number(1.0, label="Seconds to add", minimum=0.01, **wide)
                        further = gr.Button("Continue", elem_id="further", **narrow)
                    with gr.Row():
                        ring = gr.Button("Make it loop", elem_id="ring", **narrow)
                        undo = gr.Button("Undo", elem_id="undo", **narrow)
                with gr.Accordion("Compare solvers and steps", open=False, elem_id="compare"):
                    solvers = gr.CheckboxGroup(label="Solvers", **first["solvers"])
                    counts = gr.CheckboxGroup(label="Steps", **first["counts"])
                    against = gr.Button("Compare on the same noise", elem_id="against")
                    comparison = gr.HTML(elem_id="comparison")

        chosen = [*controls.values(), strength_row, further_row, solvers, counts]

        def show(model_name):
            yield [gr.update(**shown) for shown in shown_of(open_model(model_name)).values()]

        def result(takes, seed):
            figure = figure_of(takes[-1], current=True) if takes else NOTHING_YET
            return takes[-20:], figure, seed, "", gr.update(visible=bool(takes))

        def making(work):
            """A callback that makes the next sound by what the controls say."""

            def callback(takes, model_name, anew, *values, progress=gr.Progress()):  # noqa: B008
                wanted = dict(zip(controls, values, strict=False))
                if anew:
                    wanted["seed"] = random.randrange(2**31)
                said, take = values[len(controls) :], takes[-1] if takes else None
                made = work(open_model(model_name), take, wanted, lambda *at: progress(at, unit="steps"), *said)
                yield result([*takes, made], wanted["seed"])

            return readable(callback)

        def comparing(model_name, chosen, steps, *values, progress=gr.Progress()):  # noqa: B008
            wanted, tell = dict(zip(controls, values, strict=True)), lambda *at: progress(at, unit="steps")
            for takes in compare(open_model(model_name), wanted, chosen, steps, tell):
                yield f'<div class="takes" style="--columns: {len(steps)}">{"".join(map(figure_of, takes))}</div>'

        def bring(takes, model_name, seed, path):
            yield result([*takes, given_take(open_model(model_name), path)], seed)

        now = [history, name, anew, *controls.values()]
        results: dict[str, Any] = dict(
            outputs=[history, sound, controls["seed"], spans, edits], show_progress_on=sound
        )
        page.load(js=(PAGE / "app.js").read_text())
        name.change(readable(show), name, chosen)
        gr.on(
            [start.click, controls["prompt"].submit],
            making(lambda model, take, wanted, tell: make(model, flags_of(model, wanted), tell)), now, **results,
        )  # fmt: skip
        mend.click(making(mend_spans), [*now, spans], **results)
        vary.click(making(lambda *what: edit(*what[:-1], strength=what[-1])), [*now, strength], **results)
        further.click(making(lengthen), [*now, longer], **results)
        ring.click(making(close), now, **results)
        undo.click(lambda takes, seed: result(takes[:-1], seed), [history, controls["seed"]], **results)
        given.upload(readable(bring), [history, name, controls["seed"], given], **results)
        against.click(readable(comparing), [name, solvers, counts, *controls.values()], comparison)
    return page


def main(args: argparse.Namespace) -> None:
    names = names_of_models(args.model)
    try:
        import gradio as gr
    except ImportError:
        raise UserError("The page is made with gradio, which is not here: pip install tonefield[demo]") from None
    page = build_page(names)
    fonts: dict[str, Any] = {
        "font": ["system-ui", "sans-serif"],
        "font_mono": ["ui-monospace", "monospace"],
    }  # none to be fetched
    try:
        page.launch(
            server_name=args.host, server_port=args.port, inbrowser=args.open, share=False, ssr_mode=False,
            footer_links=[], show_error=True, theme=gr.themes.Default(primary_hue="indigo", **fonts),
            css=(PAGE / "app.css").read_text(),
        )  # fmt: skip
    except OSError:  # gradio speaks of its own arguments
        port = args.port or "7860 to 7959"
        raise UserError(f"--port: {port} cannot be had on {args.host}, leave it out or name another.") from None


if __name__ == "__main__":
    run(main, parse_args())
