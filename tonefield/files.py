"""Files and folders that are whole or not there, whatever stops what writes them: a kill, a full disk, a power cut."""

import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tonefield.command_line import UserError, between_processes, first_line


AGAIN = "start the same command again"


@contextmanager
def writing(path: Path | str, remedy: str = AGAIN) -> Iterator[None]:
    """
    Says of what cannot be written, in one line, what it is and how to go on. For code that only writes: libraries in
    other languages tell of a full disk in an error of their own.
    """
    try:
        yield
    except Exception as error:
        from safetensors import SafetensorError

        # Those of libsndfile and torch are of the second kind, but so is that of processes that have lost each other.
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) or between_processes(error):
            raise
        reason = first_line(error.strerror or error if isinstance(error, OSError) else error).rstrip(".")
        raise UserError(
            f"{path} cannot be written: {reason}. What was finished before is whole: make room, or mend what it is,"
            f" and {remedy}."
        ) from None


def write_text(path: Path, text: str, remedy: str = AGAIN) -> None:
    """Puts a text in the place of a file, in one step."""
    unfinished = path.with_name(f".{path.name}.partial")
    with writing(path, remedy):
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def write_sound(path: Path, waveform, rate: int) -> None:
    """Writes a sound in the format of its suffix, in one step."""
    import soundfile

    unfinished = path.with_name(f".{path.name}.partial")
    with writing(path):
        soundfile.write(unfinished, waveform, rate, format=path.suffix[1:].upper())
        unfinished.replace(path)


def sync(path: Path) -> None:
    """Waits until a file, or each one below a folder, is on the disk: its new name must not get there before it."""
    for name in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        with name.open("rb") as file:
            os.fsync(file.fileno())


def set_aside(folder: Path) -> Path:
    """Where `replace_folder` keeps what had the name of a folder."""
    return folder.with_name(f".{folder.name}.old")


def replace_folder(new: Path, folder: Path) -> None:
    """Gives a finished folder its name. One that has the name now is set aside until then; `tidy` knows where."""
    aside = set_aside(folder)
    sync(new)
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def tidy(parent: Path) -> None:
    """After a run was killed: brings back what `replace_folder` had set aside, and removes what is half written."""
    for aside in parent.glob(".*.old"):
        folder = aside.with_name(aside.name[1:-4])
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)
    # The second is what safetensors writes to, here and in the folders of a pipeline.
    for partial in itertools.chain(*map(parent.glob, (".*.partial", ".tmp??????", "*/.tmp??????"))):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def claim(folder: Path, name: str = ".lock") -> IO[str] | None:
    """
    Keeps a folder from other runs that ask for the same `name`, until the file that is returned is closed, or the
    process ends, however it does. `None` where the file system knows no locks.

    This is a lock of the process (`lockf`). One of the file (`flock`) would be inherited by the workers that read
    data, which live on for a while when their run is killed.
    """
    file = (folder / name).open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"Another run is writing to {folder} right now: wait for its end, or choose another folder."
            ) from None
        return None
    return file
