"""What must hold of every value, not only of those that somebody thought of: grids, masks, slices, layouts, orders."""

import json
import math
import unicodedata

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tonefield import MelSpectrogram, PoissonFlowScheduler, ScoreEntropyScheduler, ScoreSDEScheduler, inference
from tonefield.command_line import UNPRINTABLE, printable
from tonefield.data.audio_folder import MOST_DEPTH, AudioFolder, Recording, _depth
from tonefield.data.dataset_builder import order, plan_parts, write_rejects
from tonefield.data.pictures import shorten
from tonefield.models.token_layouts import LAYOUTS, apply_layout, legal_symbols, undo_layout, vocabulary_size
from tonefield.pipelines.tonefield_mel_editing import distance_to, paste, read_mask, samples_of_spans
from tonefield.pipelines.tonefield_windows import continuations, in_windows, window_starts
from tonefield.training.data import EndlessRows, Shares
from tonefield.training.randomness import derive_seed
from tonefield.training.recordings import hold_out


# ----- grids of noise levels

SCHEDULES = st.sampled_from(["karras", "exponential"])
SOLVERS = st.sampled_from(["dpmsolver++", "euler", "heun"])


@given(st.integers(1, 300), SCHEDULES, SOLVERS, st.floats(1e-4, 0.1), st.floats(1, 1000), st.floats(1, 20))
def test_poisson_flow_grids_fall_from_end_to_end(steps, schedule, solver, low, high, rho):
    scheduler = PoissonFlowScheduler(
        sigma_min=low, sigma_max=high, rho=rho, sigma_schedule=schedule, solver_type=solver
    )
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas
    assert levels[0] == pytest.approx(high, rel=1e-9) and levels[-1] == 0 and scheduler.num_inference_steps == steps
    distinct = levels if solver != "heun" else torch.unique_consecutive(levels)
    assert len(distinct) == steps + 1 and (distinct.diff() < 0).all()
    assert steps == 1 or distinct[-2] == pytest.approx(low, rel=1e-9)
    # The network is called once a level, and with Heun's method a second time at the end of every step but the last.
    assert len(scheduler.timesteps) == (2 * steps - 1 if solver == "heun" else steps)
    assert (scheduler.timesteps.diff() <= 0).all()
    np.testing.assert_allclose(scheduler.timesteps[0], math.log(high) / 4, rtol=1e-5, atol=1e-6)


@given(st.integers(21, 400), st.sampled_from(["ve", "vp", "subvp"]))
def test_times_of_sdes_fall_from_1(steps, sde):
    scheduler = ScoreSDEScheduler(sde=sde)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    assert len(times) >= steps and (times.diff() <= 0).all() and times.isfinite().all()
    assert len(times.unique()) >= steps - 1


@given(
    st.integers(1, 300),
    st.sampled_from(["absorb", "uniform"]),
    st.sampled_from(["loglinear", "geometric", "cosine", "cosine_squared", "linear"]),
)
def test_noise_of_tokens_falls_to_none(steps, graph, noise):
    scheduler = ScoreEntropyScheduler(16, graph_type=graph, noise_schedule=noise)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps and scheduler.timesteps.isfinite().all()
    assert (scheduler.timesteps > 0).all() and (scheduler.timesteps.diff() < 0).all()
    masked = scheduler.noise.masked(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    assert ((0 <= masked) & (masked <= 1)).all() and (masked.diff() <= 0).all()


# ----- masks and cross-fades


@st.composite
def spans_within(draw, most=4000, rate=1000):
    """A length in samples, and spans of seconds within it."""
    length = draw(st.integers(2, most))
    ends = st.tuples(st.integers(0, length), st.integers(0, length)).filter(lambda ends: ends[0] != ends[1])
    spans = [tuple(sorted(one)) for one in draw(st.lists(ends, min_size=1, max_size=4))]
    return length, spans, [(start / rate, end / rate) for start, end in spans]


@given(spans_within())
def test_spans_are_the_samples_between_their_ends(case):
    length, whole, spans = case
    new = samples_of_spans(spans, 1000, length)
    expected = [any(start <= i < end for start, end in whole) for i in range(length)]
    assert new[0].tolist() == expected


MEL = MelSpectrogram(sample_rate=1000, n_fft=64, hop_length=16, n_mels=4, num_frames=16, f_min=20)


@given(spans_within(), st.booleans())
def test_every_new_sample_lies_in_a_new_frame_and_the_complement_is_kept(case, ring):
    length, _, spans = case
    frames = 1 + length // 16
    new_frames, new_samples = read_mask(spans, MEL, frames, length, ring)
    nearest = [(i + 8) // 16 % frames if ring else min((i + 8) // 16, frames - 1) for i in range(length)]
    assert {nearest[i] for i in new_samples[0].nonzero().flatten().tolist()} == set(
        new_frames[0].nonzero().flatten().tolist()
    )
    # Given by frames, the mask of the opposite is the opposite mask.
    given, opposite = (read_mask(mask, MEL, frames, length, ring)[1] for mask in (new_frames, ~new_frames))
    assert (given ^ opposite).all() and (given | ~new_samples).all()


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 20), st.booleans(), st.booleans())
def test_what_is_beyond_the_cross_fade_is_untouched(mask, fade, ring, same_phases):
    new = torch.tensor([mask])
    rng = np.random.default_rng(len(mask))
    kept, made = (torch.from_numpy(rng.standard_normal((1, len(mask))).astype(np.float32)) for _ in range(2))
    places, n = [i for i, one in enumerate(mask) if one], len(mask)
    away = [
        min((min(abs(i - j), n - abs(i - j)) if ring else abs(i - j) for j in places), default=math.inf)
        for i in range(n)
    ]
    assert distance_to(new, ring)[0].tolist() == away
    result = paste(kept, made, new, fade, ring, same_phases)
    for i, distance in enumerate(away):
        if distance > fade:
            assert result[0, i] == kept[0, i]
        elif distance == 0:
            assert result[0, i] == pytest.approx(made[0, i].item(), abs=1e-6)
        else:
            assert abs(result[0, i]) <= math.hypot(kept[0, i], made[0, i]) + 1e-5


# ----- windows and slices


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_windows_cover_a_sound(length, size, unit, ring):
    length, size = length * unit, size * unit
    starts = window_starts(length, size, unit, ring).tolist()
    assert starts == sorted(set(starts)) and starts[0] == 0 and all(start % unit == 0 for start in starts)
    if ring or length > size:
        covered = {(start + i) % length if ring else start + i for start in starts for i in range(size)}
        assert covered == set(range(length))
        gaps = np.diff([*starts, length] if ring else starts)
        assert (gaps <= max(unit, size // 2)).all()
    x = torch.arange(2 * length, dtype=torch.float64).reshape(2, 1, length)
    # What does not depend on its window is the same after the mean.
    np.testing.assert_allclose(in_windows(lambda part, row: 3 * part, x, size, unit, ring), 3 * x, rtol=1e-6)


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(1, 80))
def test_continuations_reach_all_that_is_new(mask, size):
    size = min(size, len(mask))
    starts = continuations(torch.tensor([mask]), size)
    covered = {start + i for start in starts for i in range(size)}
    assert {i for i, new in enumerate(mask) if new} <= covered <= set(range(len(mask)))
    assert starts == sorted(starts)


@given(st.integers(0, 3000), st.sampled_from(["pad", "overlap", "drop"]))
@example(255, "overlap")
@example(256, "pad")
def test_slices_cover_a_recording(samples, pad):
    size = MEL.slice_samples
    starts = MEL.slice_starts(samples, pad)
    assert starts == sorted(set(starts)) and all(0 <= start < max(samples, 1) for start in starts)
    assert all(start + size <= samples for start in starts[:-1])
    if pad == "drop":
        assert len(starts) == samples // size
    else:
        assert len(starts) == -(-samples // size)
        assert {start + i for start in starts for i in range(size)} >= set(range(samples))
    if pad == "overlap" and samples >= size:
        assert starts[-1] + size == samples or samples % size == 0
    waveform = torch.arange(1.0, samples + 1)
    slices = MEL.slices(waveform, pad)
    assert slices.shape == (len(starts), size)
    for start, one in zip(starts, slices, strict=True):
        whole = waveform[start : start + size]
        assert torch.equal(one[: len(whole)], whole) and not one[len(whole) :].any()


@given(st.floats(0.001, 1000))
def test_frames_for_seconds_are_the_nearest_number(seconds):
    frames = MEL.frames_for(seconds)
    assert frames >= 1 and (frames == 1 or abs(frames * 16 / 1000 - seconds) <= 0.008 + 1e-9)
    assert 1 + MEL.samples_for(frames) // 16 == frames and 1 + (MEL.samples_for(frames) + 1) // 16 == frames + 1


# ----- layouts of tokens


@given(st.data(), st.sampled_from(LAYOUTS), st.integers(1, 5), st.integers(1, 8), st.integers(0, 9), st.integers(1, 3))
def test_layouts_come_back_and_hold_legal_symbols_only(data, layout, codebooks, size, frames, batch):
    codebooks = 1 if layout == "single" else codebooks
    count = batch * codebooks * frames
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
    codes = torch.tensor(values, dtype=torch.long).reshape(batch, codebooks, frames)
    tokens = apply_layout(codes, layout, size)
    assert torch.equal(undo_layout(tokens, layout, codebooks, size), codes)
    legal = legal_symbols(layout, codebooks, size, frames)
    assert legal.shape == (*tokens.shape[1:], vocabulary_size(layout, codebooks, size))
    assert legal.expand(batch, *legal.shape).gather(-1, tokens[..., None]).all()
    # As many sequences are legal as there are codes: the layout loses nothing and adds nothing.
    assert math.prod(legal.sum(-1).flatten().tolist()) == size ** (codebooks * frames)


# ----- orders


class Numbers:
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: list[int]) -> dict:
        return {"row": rows}


@given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 5))
def test_each_epoch_is_a_permutation(count, seed, epoch):
    rows = EndlessRows(Numbers(count), lambda columns, positions: columns, seed)
    positions = list(range(epoch * count, (epoch + 1) * count))
    assert sorted(rows.get(positions)["row"]) == list(range(count))
    # Nor does it matter in which order, or how often, they are asked for.
    assert rows.get(positions[::-1])["row"] == EndlessRows(Numbers(count), rows.read, seed).get(positions)["row"][::-1]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 7), st.integers(1, 3))
def test_processes_and_micro_batches_divide_the_same_positions(batch, accumulation, processes, first, steps):
    taken = []
    for process in range(processes):
        source = Shares(batch, accumulation, processes, process).from_step(first)
        taken += [position for _ in range(steps * accumulation) for position in next(source)]
    per_step = batch * accumulation * processes
    assert sorted(taken) == list(range(first * per_step, (first + steps) * per_step))
    one = Shares(per_step)
    for step in range(first, first + steps):
        divided = [Shares(batch, accumulation, processes, p).positions(step, m) for p in range(processes)
                   for m in range(accumulation)]  # fmt: skip
        assert sorted(position for share in divided for position in share) == one.positions(step, 0)


PARTS = st.lists(st.one_of(st.integers(), st.text().filter(lambda text: "/" not in text)), min_size=1, max_size=4)


@given(PARTS, PARTS)
def test_seeds_fit_and_tell_apart(some, others):
    seed = derive_seed(*some)
    assert 0 <= seed < 2**63 and seed == derive_seed(*some)
    torch.Generator().manual_seed(seed)
    if list(map(str, some)) != list(map(str, others)):
        assert seed != derive_seed(*others)


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
SETS = st.lists(NAMES, min_size=2, max_size=30, unique=True)


@given(SETS, st.floats(0, 1), st.randoms())
def test_what_is_held_out_follows_from_names_alone(names, fraction, rng):
    train, held = hold_out([Recording(name, None) for name in names], fraction)
    assert sorted(one.name for one in train + held) == sorted(names) and train and held
    shuffled = rng.sample(names, len(names))
    assert {one.name for one in hold_out([Recording(name, None) for name in shuffled], fraction)[1]} == {
        one.name for one in held
    }


@given(SETS, st.integers(0, 2**31), st.randoms(), st.data())
def test_the_order_of_recordings_follows_from_names_alone(names, seed, rng, data):
    recordings = [Recording(name, None) for name in names]
    found = [one.name for one in order(recordings, seed)]
    assert sorted(found) == sorted(names)
    assert [one.name for one in order(rng.sample(recordings, len(names)), seed)] == found
    gone = data.draw(st.sampled_from(names))  # the others keep their places among each other
    without = [one.name for one in order([one for one in recordings if one.name != gone], seed)]
    assert without == [name for name in found if name != gone]


@given(st.integers(1, 40), st.floats(0, 0.4), st.floats(0, 0.4), st.integers(0, 99))
def test_splits_of_a_stream_hold_each_recording_once(count, validation, test, seed):
    names = [f"{i}.wav" for i in range(count)]
    parts = list(plan_parts([Recording(name, None) for name in names], {"validation": validation, "test": test}, seed))
    assert [part.index for part in parts] == list(range(len(parts)))
    assert sorted(one.name for part in parts for one in part.recordings) == sorted(names)
    assert all(fraction > 0 for split, fraction in (("validation", validation), ("test", test))
               if any(part.split == split for part in parts))  # fmt: skip


# ----- files


@given(st.text())
def test_printable_text_is_one_line_and_says_all(text):
    shown = printable(text)
    assert not UNPRINTABLE.search(shown) and len(shown.splitlines()) <= 1
    assert all(unicodedata.category(sign) not in ("Cc", "Cs", "Zl", "Zp") for sign in shown)
    assert printable(shown) == shown and len(shorten(text)) <= 40
    shown.encode()
    if not UNPRINTABLE.search(text):
        assert shown == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def depth(value) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(JSON, st.booleans())
def test_the_depth_of_json_is_told_without_parsing_it(value, escaped):
    assert _depth(json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass")) == depth(value)
    assert depth(value) < MOST_DEPTH


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.text()), max_size=5))
def test_rejects_are_a_line_each(tmp_path_factory, rejects):
    path = tmp_path_factory.mktemp("rejects") / "rejects.jsonl"
    rejects = [(name, why.encode(errors="replace").decode()) for name, why in rejects]
    write_rejects(path, rejects)
    lines = path.read_bytes().decode().split("\n")[:-1]
    assert [tuple(json.loads(line).values()) for line in lines] == rejects


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=30)


@given(
    st.lists(st.tuples(TEXT, st.integers(-(2**60), 2**60)), min_size=1, max_size=6), st.sampled_from(["csv", "jsonl"])
)
def test_metadata_comes_back_as_it_was_written(tmp_path_factory, rows, kind):
    """Whatever captions hold: quotes, commas, line breaks, brackets."""
    import csv

    folder = tmp_path_factory.mktemp("metadata")
    rows = [{"file_name": f"{i}.wav", "caption": f"a{text}", "take": take} for i, (text, take) in enumerate(rows)]
    for row in rows:
        (folder / row["file_name"]).touch()
    with (folder / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    found = {one.name: one.columns for one in AudioFolder(folder)}
    assert found == {row.pop("file_name"): row for row in rows}


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SECONDS = st.floats(0.001, 100)


@given(
    st.fixed_dictionaries(
        {"seed": st.integers(-5, 2**40), "output_format": st.sampled_from(["wav", "flac", "ogg", "mp3"])},
        optional={
            "prompt": st.lists(WORDS, min_size=1, max_size=3), "class_label": st.lists(WORDS, min_size=1, max_size=3),
            "steps": st.integers(1, 10**6), "guidance_scale": st.floats(-10, 10), "loop": st.just(True),
            "temperature": st.floats(0.1, 2), "negative_prompt": WORDS, "model": WORDS, "eta": st.floats(0, 1),
        },
    ),
    st.none() | st.lists(st.tuples(SECONDS, SECONDS).map(sorted).filter(lambda ends: ends[0] < ends[1]), min_size=1),
)  # fmt: skip
def test_a_manifest_says_the_flags_again(settings, spans):
    if spans:
        settings |= {"audio": "a.wav", "inpaint": spans}
    args = vars(inference.parse_args(inference.flags_of(settings)))
    told = {name: args[name] for name in settings}
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(settings))
    rest = {name: value for name, value in args.items() if name not in settings}
    assert rest == {name: value for name, value in vars(inference.parse_args([])).items() if name in rest}


@settings(max_examples=5)
@given(st.lists(TEXT, min_size=1, max_size=4), st.integers(0, 3))
def test_a_dataset_of_rows_is_read_in_the_same_order_by_any_number_of_processes(texts, seed):
    rows = EndlessRows(Dataset.from_dict({"text": texts}), lambda columns, positions: columns, seed)
    alone = [text for position in range(12) for text in rows.get([position])["text"]]
    for processes, batch in (2, 3), (3, 2), (1, 6):
        together = [[]] * 12
        for process in range(processes):
            source = Shares(batch, 12 // (processes * batch), processes, process).from_step(0)
            for _ in range(12 // (processes * batch)):
                positions = next(source)
                for position, text in zip(positions, rows.get(positions)["text"], strict=True):
                    together[position] = text
        assert together == alone
