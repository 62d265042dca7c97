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

from tonefield import inference
from tonefield.command_line import UserError, first_line, make_parser, parse, run


# What the page lets one choose; a model shows those that it has a use for.
CONTROLS = (
    "prompt", "negative_prompt", "class_label", "steps", "solver", "guidance_scale", "seconds", "loop", "seed",
)  # fmt: skip
SOLVERS = ("dpmsolver++", "heun", "euler", "rk45", "pc", "event", "analytic", "remdm", "confidence")
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

    @property
    def fixed_length(self) -> bool:
        return "seconds" not in self.controls


def names_of_models(given: Sequence[str] | None) -> list[str]:
    if given:
        return list(dict.fromkeys(given))
    names = sorted(os.path.relpath(file.parent) for file in inference.PRETRAINED.glob("*/model_index.json"))
    if not names:
        raise UserError(
            f"There are no models in {inference.PRETRAINED}: name one with --model FOLDER or --model USER/NAME."
        )
    return names


@functools.lru_cache(maxsize=4)
def open_model(name: str) -> Model:
    pipe = inference.load_model(flags(model=name))
    if all(pipe.components.get(part) is None for part in ("mel", "audio_tokenizer")):
        raise UserError(f"--model {name} makes no sound: it has neither a mel nor an audio tokenizer.")
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(pipe.__call__).parameters
    controls = {flag for flag, argument in inference.ARGUMENTS.items() if argument in known} | {"seed", "solver"}
    classes = list(pipe.config.get("label2id") or map(str, range(getattr(pipe, "num_classes", 0))))
    reads = pipe.components.get("text_encoder") is not None
    controls -= set() if classes else {"class_label"}
    controls -= set() if reads else {"prompt", "negative_prompt"}
    controls -= set() if classes or reads else {"guidance_scale"}
    window = inference.window_seconds(pipe)
    return Model(
        name, pipe, pipe.scheduler, controls, classes, solvers_of(pipe.scheduler),
        (pipe.config.get("card") or {}).get("num_inference_steps") or known["num_inference_steps"].default,
        round(window, 3) if window < 60 else 5.0,
    )  # fmt: skip


def solvers_of(scheduler) -> list[str]:
    """The names of the solvers that a scheduler can be given, its own first."""
    config = scheduler.config
    own = config.get("solver_type") if config.get("solver_type") in SOLVERS else config.get("predictor")
    own = own or {cls: name for name, cls in inference.SOLVERS.items()}.get(type(scheduler).__name__)
    found = {own or type(scheduler).__name__: None}
    for name in dict.fromkeys((*SOLVERS, *inference.SOLVERS)):
        try:
            inference.change_solver(scheduler, name)
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


def make(model: Model, args: argparse.Namespace, tell: Callable[[int, int], None] = lambda step, steps: None) -> Take:
    """One sound, and what it took. `tell` hears of each step."""
    pipe, calls = model.pipe, 0
    prompt, label = ((getattr(args, name) or [None])[0] for name in ("prompt", "class_label"))
    sound = inference.Sound(0, args.seed, prompt, label)

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    def step_ended(pipe, step: int, timestep, shown: dict) -> dict:
        tell(step + 1, max(pipe.num_timesteps, step + 1))
        return shown

    with ONE_AT_A_TIME:
        scheduler = inference.change_solver(model.scheduler, args.solver) if args.solver else model.scheduler
        pipe.register_modules(scheduler=scheduler)
        call = inference.make_call(pipe, args, [sound])
        hook = (pipe.components.get("unet") or pipe.components["transformer"]).register_forward_hook(count)
        started = time.perf_counter()
        try:
            waveform = inference.make_batch(pipe, call | {"callback_on_step_end": step_ended}, [sound])[0]
        finally:
            hook.remove()
        took = time.perf_counter() - started
    rate = inference.sampling_rate_of(pipe)
    word = re.sub(r"\W+", "-", sound.title.lower()).strip("-")[:40]
    cost = f"{calls} network call{'s' * (calls != 1)}, {took:.1f} s"
    return take_of(waveform, rate, f"{word}-{args.seed}.wav", sound.title, bool(args.loop), cost, command_of(args))


def take_of(waveform, rate: int, name: str, title: str, *rest) -> Take:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sound.wav")
        inference.write_sound(waveform, rate, file)
        return Take(file.read_bytes(), name, title, rate, len(waveform) / rate, *rest)


def given_take(model: Model, path: str) -> Take:
    """A sound of the user's own: without the silence around it, and no longer than the model can take."""
    import librosa

    from tonefield.data.audio_files import AudioError, read_audio

    rate = inference.sampling_rate_of(model.pipe)
    try:
        audio, _ = librosa.effects.trim(read_audio(Path(path), rate), top_db=40)
    except (AudioError, OSError) as error:
        raise UserError(f"This sound cannot be used: {first_line(error)}") from None
    longest = int(inference.window_seconds(model.pipe) * rate) if model.fixed_length else len(audio)
    return take_of(audio[:longest], rate, "given.wav", "Your sound")


def edit(model: Model, take: Take | None, wanted: dict[str, Any], tell=lambda step, steps: None, **how: Any) -> Take:
    """A sound made from another: with `strength`, `inpaint`, `continue_to` or `loop`."""
    if take is None:
        raise UserError("There is no sound yet: make one first, or bring one of yours.")
    if take.loops and "continue_to" not in how:
        how["loop"] = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, take.name)
        file.write_bytes(take.wav)
        args = flags_of(model, wanted, audio=str(file), **how)
        made = make(model, args, tell)
    made.command = command_of(argparse.Namespace(**{**vars(args), "audio": take.name}))
    return made


def close(model: Model, take: Take | None, wanted: dict[str, Any], tell=lambda step, steps: None) -> Take:
    """The sound as a loop: an eighth of it on either side of the seam is made anew, to fit together."""
    import soundfile

    if take is not None and not take.loops and not model.fixed_length and hasattr(model.pipe, "mel"):
        # its length must be a whole number of what the networks halve
        unit = model.pipe._unit * model.pipe.mel.config.hop_length
        audio, rate = soundfile.read(io.BytesIO(take.wav), dtype="float32")
        if whole := (len(audio) + 1) // unit * unit:
            take = take_of(audio[:whole], rate, take.name, take.title)
    end = take.seconds if take else 1.0
    return edit(model, take, wanted, tell, loop=True, inpaint=[(0.0, end / 8), (end * 7 / 8, end)])


def read_spans(text: str, seconds: float) -> list[tuple[float, float]]:
    """Spans of seconds, as many as there are; an end beyond the sound's is its end."""
    try:
        spans = [inference.span(part) for part in text.replace(",", " ").split()]
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error)) from None
    if not spans:
        raise UserError("Draw a finger or the mouse across the picture first: what you mark is made anew.")
    for start, _ in spans:
        if start >= seconds:
            raise UserError(f"{start:g} s lies beyond the end of the sound, which is {seconds:.2f} s long.")
    return [(start, min(end, seconds)) for start, end in spans]


def compare(
    model: Model, wanted: dict[str, Any], solvers: list[str], steps: list[int], tell=lambda step, steps: None
) -> Iterator[list[Take]]:
    """The same noise through several solvers in several numbers of steps: all sounds so far, after each."""
    if not solvers or not steps:
        raise UserError("Choose at least one solver and one number of steps to compare.")
    takes: list[Take] = []
    for solver in solvers:
        for count in sorted(steps):
            take = make(model, flags_of(model, wanted | {"solver": solver, "steps": count}), tell)
            take.title = f"{solver}, {count} steps"
            takes.append(take)
            yield takes


# ----- the page

STYLE = """
.gradio-container { max-width: 1120px !important; margin: auto; }
.intro h1 { font-size: 1.7rem; font-weight: 650; margin: .3rem 0 0; }
.intro p, .hint { color: var(--body-text-color-subdued); margin: 0; }
.classes .wrap { max-height: 12rem; overflow-y: auto; }
.take { margin: 0; }
.take .picture { position: relative; overflow: hidden; border-radius: 8px; background: #000004; }
.take img { display: block; width: 100%; height: 100%; object-fit: fill; user-select: none; pointer-events: none; }
.take .head { position: absolute; top: 0; bottom: 0; width: 2px; background: #fff; opacity: 0; pointer-events: none; }
.take .span { position: absolute; top: 0; bottom: 0; background: #4cc9f055; border: solid #4cc9f0; border-width: 0 2px;
  pointer-events: none; }
.take .ticks { display: flex; justify-content: space-between; font-size: .75rem; font-variant-numeric: tabular-nums;
  color: var(--body-text-color-subdued); margin: 2px 2px 6px; }
.take audio { display: block; width: 100%; height: 40px; }
.take figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; margin-top: 6px; align-items: baseline; }
.take figcaption b { font-weight: 600; overflow-wrap: anywhere; }
.take figcaption span { color: var(--body-text-color-subdued); font-size: .9rem; }
#sound .picture { height: 240px; cursor: crosshair; touch-action: pan-y; }
#sound .empty { display: grid; place-items: center; text-align: center; height: 240px; padding: 0 2rem;
  border-radius: 8px; border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued); }
#sound code { display: block; overflow-x: auto; white-space: pre; font-size: .8rem; padding: .5rem; margin-top: 4px;
  border-radius: 6px; background: var(--background-fill-secondary); }
#sound details { margin-top: 6px; font-size: .85rem; color: var(--body-text-color-subdued); }
.takes { display: grid; gap: 1.2rem 1rem; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
.takes .picture { height: 110px; }
.takes .ticks { display: none; }
.takes audio { margin-top: 6px; }
"""

# The text field of the spans is where they are kept; what is painted follows it, whoever writes there.
SCRIPT = r"""
() => {
  const field = () => document.querySelector('#spans textarea, #spans input');
  const spans = () => [...field().value.matchAll(/([\d.]+):([\d.]+)/g)].map(m => [+m[1], +m[2]]);
  const paint = () => {
    const picture = document.querySelector('#sound .picture');
    if (!picture || !field()) return;
    picture.querySelectorAll('.span').forEach(mark => mark.remove());
    for (const [start, end] of spans()) {
      const mark = document.createElement('div');
      mark.className = 'span';
      mark.style.left = 100 * start / picture.dataset.seconds + '%';
      mark.style.width = 100 * (end - start) / picture.dataset.seconds + '%';
      picture.append(mark);
    }
  };
  const write = list => {
    const joined = [];
    for (const [start, end] of list.sort((a, b) => a[0] - b[0])) {
      const last = joined.at(-1);
      if (last && start <= last[1]) last[1] = Math.max(last[1], end); else joined.push([start, end]);
    }
    field().value = joined.map(span => span.map(x => +x.toFixed(3)).join(':')).join(' ');
    field().dispatchEvent(new Event('input', {bubbles: true}));
  };
  const playHead = audio => {
    const head = audio.closest('.take').querySelector('.head');
    head.style.opacity = audio.paused && !audio.currentTime ? 0 : 0.9;
    head.style.left = 100 * audio.currentTime / (audio.duration || 1) + '%';
    if (!audio.paused) requestAnimationFrame(() => playHead(audio));
  };
  document.addEventListener('input', event => { if (event.target === field()) paint(); });
  new MutationObserver(changes => {
    if (!changes.every(change => change.target.matches('.picture'))) paint();
  }).observe(document.body, {childList: true, subtree: true});
  document.addEventListener('play', event => {
    document.querySelectorAll('.take audio').forEach(other => { if (other !== event.target) other.pause(); });
    playHead(event.target);
  }, true);
  document.addEventListener('seeked', event => playHead(event.target), true);
  document.addEventListener('ended', event => { event.target.currentTime = 0; }, true);

  let drag = null;
  document.addEventListener('pointerdown', event => {
    const picture = event.target.closest('.take .picture');
    if (!picture || event.button) return;
    const box = picture.getBoundingClientRect(), seconds = +picture.dataset.seconds;
    const at = x => Math.min(1, Math.max(0, (x - box.left) / box.width)) * seconds;
    drag = {x: event.clientX, at, picture, marks: picture.closest('#sound') ? spans() : null};
    if (drag.marks) event.preventDefault();
  });
  document.addEventListener('pointermove', event => {
    if (!drag || !drag.marks || Math.abs(event.clientX - drag.x) < 5) return;
    write([...drag.marks.map(span => [...span]), [drag.at(drag.x), drag.at(event.clientX)].sort((a, b) => a - b)]);
  });
  document.addEventListener('pointercancel', () => { drag = null; });  // the page is scrolled instead
  document.addEventListener('pointerup', event => {
    if (!drag) return;
    const {x, at, picture, marks} = drag, time = at(x);
    drag = null;
    if (Math.abs(event.clientX - x) >= 5) return;
    if (marks && marks.some(([start, end]) => start <= time && time <= end))
      return write(marks.filter(([start, end]) => time < start || end < time));
    const audio = picture.closest('.take').querySelector('audio');
    audio.currentTime = time;
    audio.play();
  });
}
"""

NOTHING_YET = (
    '<div class="empty">Your sound appears here, with its picture:<br>time from left to right, pitch upwards.</div>'
)


def text_of(text: str) -> str:
    """Text for the page, out of reach of its templates."""
    return re.sub(r"[{}$`\\]", lambda sign: f"&#{ord(sign[0])};", html.escape(text))


def figure_of(take: Take, current: bool = False) -> str:
    """The player and the picture of a sound, whole, so that nothing is left to be fetched."""
    import numpy as np
    import soundfile

    from tonefield.data.pictures import draw_spectrogram

    waveform, rate = soundfile.read(io.BytesIO(take.wav), dtype="float32")
    picture = io.BytesIO()
    draw_spectrogram(np.atleast_1d(waveform), rate).save(picture, format="png")
    ticks = "".join(f"<span>{take.seconds * part / 4:.2f}{' s' * (part == 4)}</span>" for part in range(5))
    sound, image = (base64.b64encode(data).decode() for data in (take.wav, picture.getvalue()))
    extra = ""
    if current:
        extra = f'<span><a download="{text_of(take.name)}" href="data:audio/wav;base64,{sound}">Download</a></span>'
    command = f"<details><summary>On the command line</summary><code>{text_of(take.command)}</code></details>"
    return (
        f'<figure class="take"><div class="picture" data-seconds="{take.seconds:.6f}">'
        f'<img alt="Spectrogram of {text_of(take.title)}" src="data:image/png;base64,{image}"><i class="head"></i></div>'
        f'<div class="ticks">{ticks}</div>'
        f'<audio controls {"autoplay" * current} {"loop" * take.loops} src="data:audio/wav;base64,{sound}"></audio>'
        f"<figcaption><b>{text_of(take.title)}</b><span>{'loop, ' * take.loops}{take.cost}</span>{extra}</figcaption>"
        f"{command if current and take.command else ''}</figure>"
    )


def build_page(names: list[str]):
    """The page as gradio knows it. What it does is done by the functions above."""
    import gradio as gr

    def readable(function):
        """What the user can mend is shown in the page in one line."""

        @functools.wraps(function)
        def guarded(*values):
            try:
                yield from function(*values)
            except (UserError, ValueError, TypeError) as error:
                raise gr.Error(first_line(error), print_exception=False) from None

        return guarded

    first = open_model(names[0])
    with gr.Blocks(title="tonefield", analytics_enabled=False) as page:
        history = gr.State([])
        gr.HTML("<h1>tonefield</h1><p>Sound out of noise, on this machine.</p>", elem_classes="intro")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                name = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
                controls = {
                    "prompt": gr.Textbox(label="What do you want to hear?", lines=2, submit_btn=False),
                    "class_label": gr.Radio([], label="What do you want to hear?", elem_classes="classes"),
                }
                start = gr.Button("Make a sound", variant="primary", elem_id="make")
                with gr.Accordion("Settings", open=False):
                    controls |= {
                        "steps": gr.Slider(1, 256, step=1, label="Steps from noise to sound"),
                        "solver": gr.Dropdown([], label="Solver"),
                        "guidance_scale": gr.Slider(
                            0, 10, value=3, step=0.1, label="Guidance",
                            info="1 follows your choice as it was learnt, more exaggerates it",
                        ),
                        "negative_prompt": gr.Textbox(label="What you do not want to hear"),
                        "seconds": gr.Number(label="Seconds", minimum=0.01),
                        "loop": gr.Checkbox(label="Repeats without a click"),
                        "seed": gr.Number(value=0, precision=0, minimum=0, label="Seed"),
                    }  # fmt: skip
                    fresh = gr.Checkbox(True, label="Another seed each time")
                with gr.Accordion("Begin with a sound of yours", open=False):
                    given = gr.Audio(sources=["upload", "microphone"], type="filepath", show_label=False)
            with gr.Column(scale=3, min_width=320):
                sound = gr.HTML(NOTHING_YET, elem_id="sound")
                with gr.Column(visible=False) as edits:
                    gr.HTML(
                        "Drag across the picture to mark what shall be made anew. Tap to listen from there.",
                        elem_classes="hint",
                    )
                    with gr.Row(equal_height=True):
                        spans = gr.Textbox(label="Marked, in seconds", elem_id="spans", scale=3, min_width=180)
                        mend = gr.Button("Make this part anew", scale=1, min_width=180, elem_id="mend")
                    with gr.Row(equal_height=True) as vary_row:
                        strength = gr.Slider(
                            0, 1, value=0.4, step=0.05, label="How far to go from it", scale=3, min_width=180
                        )
                        vary = gr.Button("Vary", scale=1, min_width=180, elem_id="vary")
                    with gr.Row(equal_height=True) as further_row:
                        longer = gr.Number(2.0, label="Seconds to add", minimum=0.01, scale=3, min_width=180)
                        further = gr.Button("Continue", scale=1, min_width=180, elem_id="further")
                    with gr.Row():
                        ring = gr.Button("Close it to a loop", min_width=140, elem_id="ring")
                        undo = gr.Button("Undo", min_width=140, elem_id="undo")
                with gr.Accordion("Compare solvers and steps", open=False, elem_id="compare"):
                    solvers = gr.CheckboxGroup([], label="Solvers")
                    counts = gr.CheckboxGroup([], label="Steps")
                    against = gr.Button("Compare on the same noise", elem_id="against")
                    comparison = gr.HTML(elem_classes="takes-box", elem_id="comparison")

        choices = [*controls.values()]

        def show(model_name):
            """The controls that this model has a use for, with its own values."""
            model = open_model(model_name)
            values = {
                "class_label": dict(choices=model.classes, value=model.classes[0] if model.classes else None),
                "steps": dict(value=model.steps, maximum=max(100, 2 * model.steps)),
                "solver": dict(choices=model.solvers, value=model.solvers[0]),
                "seconds": dict(value=model.seconds),
            }
            updates = [gr.update(visible=key in model.controls, **values.get(key, {})) for key in controls]
            steps = sorted({max(1, model.steps // 4), max(1, model.steps // 2), model.steps, 2 * model.steps})
            yield [
                *updates,
                gr.update(visible="strength" in model.controls),
                gr.update(visible=not model.fixed_length),
                gr.update(choices=model.solvers, value=model.solvers[:2]),
                gr.update(choices=steps, value=[steps[0], model.steps]),
            ]

        shown = [*choices, vary_row, further_row, solvers, counts]

        def wishes(values, anew):
            wanted = dict(zip(controls, values, strict=True))
            return wanted | ({"seed": random.randrange(2**31)} if anew else {})

        def result(takes, seed):
            figure = figure_of(takes[-1], current=True) if takes else NOTHING_YET
            return takes[-20:], figure, seed, "", gr.update(visible=bool(takes))

        results = [history, sound, controls["seed"], spans, edits]

        def doing(work):
            """A callback that makes a sound of the current one, the chosen model and what the controls say."""

            def callback(takes, model_name, anew, *values, progress=gr.Progress()):
                values, more = values[: len(controls)], values[len(controls) :]
                wanted = wishes(values, anew)
                take = takes[-1] if takes else None
                made = work(open_model(model_name), take, wanted, lambda i, n: progress((i, n), unit="steps"), *more)
                yield result([*takes, made], wanted["seed"])

            return readable(callback)

        def generate(model, take, wanted, tell):
            return make(model, flags_of(model, wanted), tell)

        def mend_part(model, take, wanted, tell, text):
            return edit(model, take, wanted, tell, inpaint=read_spans(text, take.seconds))

        def vary_it(model, take, wanted, tell, strength):
            return edit(model, take, wanted, tell, strength=strength)

        def go_on(model, take, wanted, tell, seconds):
            return edit(model, take, wanted, tell, continue_to=take.seconds + seconds)

        def take_back(takes, seed):
            yield result(takes[:-1], seed)

        def bring(takes, model_name, seed, path):
            yield result([*takes, given_take(open_model(model_name), path)], seed)

        def compared(model_name, anew, chosen_solvers, chosen_steps, *values, progress=gr.Progress()):
            wanted = wishes(values, False)
            model = open_model(model_name)
            for takes in compare(model, wanted, chosen_solvers, chosen_steps, lambda i, n: progress((i, n))):
                yield '<div class="takes">' + "".join(map(figure_of, takes)) + "</div>"

        page.load(readable(show), name, shown)
        name.change(readable(show), name, shown)
        now = [history, name, fresh, *choices]
        gr.on([start.click, controls["prompt"].submit], doing(generate), now, results)
        mend.click(doing(mend_part), [*now, spans], results)
        vary.click(doing(vary_it), [*now, strength], results)
        further.click(doing(go_on), [*now, longer], results)
        ring.click(doing(close), now, results)
        undo.click(readable(take_back), [history, controls["seed"]], results)
        given.input(readable(bring), [history, name, controls["seed"], given], results)
        against.click(readable(compared), [name, fresh, solvers, counts, *choices], comparison)
    return page


def main(args: argparse.Namespace) -> None:
    names = names_of_models(args.model)
    try:
        import gradio as gr
    except ImportError:
        raise UserError("The page is made with gradio, which is not here: pip install tonefield[demo]") from None
    page = build_page(names)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to be fetched
    try:
        page.queue(api_open=False).launch(
            server_name=args.host, server_port=args.port, inbrowser=args.open, share=False, ssr_mode=False,
            footer_links=[], theme=gr.themes.Soft(**fonts), css=STYLE, js=SCRIPT,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {args.port} cannot be used: {first_line(error)}") from None


if __name__ == "__main__":
    run(main, parse_args())
