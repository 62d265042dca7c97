"""Everything that docs/ tells its readers to type is typed here; what is generated in it is what the code says."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image
from typed_pages import ROOT, blocks_of, build, make_strikes, type_in

from tonefield.evaluate import COMMANDS


PAGES = build.pages()
TYPED = [page for page in PAGES if any(block.language in ("python", "bash") for block in blocks_of(page))]
CONSOLE = [
    (block.place, command)
    for page in [ROOT / "README.md", *PAGES]
    for block in blocks_of(page)
    if block.language in ("console", "bash")
    for command in block.commands
]
PICTURES = sorted((build.DOCS / "pictures").glob("*.png"))


def name(page):
    return page.relative_to(build.DOCS).as_posix()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which a reader of all pages works, with recordings of drums."""
    folder = tmp_path_factory.mktemp("docs")
    make_strikes(folder / "drums")
    for name in ("recipes", "pretrained"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def typed():
    """The pages that have been gone through."""
    return set()


def go_through(page, typed):
    """Types all of a page, after the pages that it says it goes on from."""
    if page in typed:
        return
    typed.add(page)
    for before in re.findall(
        r"^The commands on this page go on from .*\((.+?)\)", page.read_text(encoding="utf-8"), re.MULTILINE
    ):
        go_through((page.parent / before).resolve(), typed)
    known = {}
    for block in blocks_of(page):
        if block.language in ("python", "bash"):
            type_in(block, known)


@pytest.mark.parametrize("page", TYPED, ids=name)
def test_page(page, folder, typed, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    go_through(page, typed)


@pytest.mark.parametrize("page", [page for page in PAGES if build.GENERATED.search(page.read_text())], ids=name)
def test_what_is_generated_is_what_the_parsers_say(page):
    text = page.read_text(encoding="utf-8")
    assert build.filled(text) == text, f"{name(page)} is out of date: make docs"


def test_every_script_and_every_subcommand_has_its_flags_on_a_page():
    given = {found[3] for page in PAGES for found in build.GENERATED.finditer(page.read_text(encoding="utf-8"))}
    scripts = {f"python {path.name}" for path in ROOT.glob("*.py")} - {"python setup.py"}
    importers = {
        f"python -m tonefield.conversion.{path.stem}"
        for path in (ROOT / "conversion").glob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    assert given == scripts | {f"python evaluate.py {command}" for command in COMMANDS} | importers | {
        "METRICS", "EMBEDDINGS"
    }  # fmt: skip


def test_flags_of_commands_exist():
    """Also of those that are not run, because they need the Hub, a GPU or hours."""
    parsed = 0
    for place, command in CONSOLE:
        words = shlex.split(command)
        start = next((i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"), None)
        if start is None:
            continue
        words = words[start:]
        size = 2 if words[0] == "-m" or set(words[1:2]) & set(COMMANDS) else 1
        parser = build.parser_of(shlex.join(["python", *words[:size]]))
        try:
            parser.parse_args(words[size:])
        except SystemExit as left:
            pytest.fail(f"{place}: {command}: {left}")
        parsed += 1
    assert parsed > 50


def test_flags_in_texts_exist():
    """In the tables of other projects' flags, ours are on the right."""
    generated = {found[3] for page in PAGES for found in build.GENERATED.finditer(page.read_text(encoding="utf-8"))}
    ours = {"--num_processes", "--multi_gpu", "--num_machines", "--machine_rank", "--main_process_ip",
            "--cpu", "--config_file", "--pdb"}  # of accelerate and pytest  # fmt: skip
    for command in generated - {"METRICS", "EMBEDDINGS"}:
        ours |= {option for action in build.parser_of(command)._actions for option in action.option_strings}
    for page in PAGES:
        for line in re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines():
            if name(page) == "coming_from.md":
                line = line.split("|")[2] if line.startswith("|") else ""
            for code in re.findall(r"`([^`]+)`", line):
                assert set(re.findall(r"--[\w-]+", code)) <= ours, f"{name(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_all_pages_are_in_the_index():
    index = (build.DOCS / "README.md").read_text(encoding="utf-8")
    assert all(f"({name(page)})" in index for page in PAGES if name(page) != "README.md")


def test_pictures_are_what_the_code_draws(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_pictures", build.DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.draw_all(tmp_path)
    assert [path.name for path in PICTURES] == sorted(path.name for path in tmp_path.iterdir())
    for path in PICTURES:
        assert path.stat().st_size < 180_000
        ours, drawn = Image.open(path), Image.open(tmp_path / path.name)
        if ours.info["Software"] == drawn.info["Software"]:  # other versions set letters and axes otherwise
            difference = np.abs(np.asarray(ours.convert("RGB"), float) - np.asarray(drawn.convert("RGB"), float))
            assert (difference.max(2) > 60).mean() < 0.003, path.name
    shown = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"pictures/{path.name}" in shown for path in PICTURES)
