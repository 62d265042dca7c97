"""Where recordings come from: a folder with what is known of them beside the audio, or a dataset."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from datasets import Audio, ClassLabel, Dataset, Features, IterableDataset, Value
from datasets.features.features import generate_from_arrow_type

from tonefield.command_line import UserError, printable
from tonefield.data.audio_files import FFMPEG_EXTENSIONS, NOT_A_FILE, SOUNDFILE_EXTENSIONS, is_special
from tonefield.data.loading import LOOSE_FILES


METADATA_FILES = ("metadata.csv", "metadata.jsonl", "manifest.jsonl")
MOST_COLUMNS, MOST_DEPTH = 1000, 32  # of metadata: more than anybody writes, less than what does harm


@dataclass(frozen=True)
class Recording:
    """One file of audio: its name within the source, where to read it, and what is known of it."""

    name: str
    audio: Path | bytes | None
    size: int = 0
    columns: dict[str, Any] = field(default_factory=dict)


class AudioFolder:
    """The recordings below a folder, in the order of their names.

    Every column of a `metadata.csv`, `metadata.jsonl` or `manifest.jsonl` (the AudioFolder convention: `file_name` is
    relative to the file that names it) comes along. A column `label` there, or else the folder that a file lies in, is
    its class. `flag` is what an error calls the folder.
    """

    def __init__(self, folder: str | Path, flag: str = "--input_dir"):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "is not a folder" if self.folder.exists() else "does not exist"
            raise UserError(f"{flag} {folder} {what}.")
        self.rejects: list[tuple[str, str]] = []  # files that are no recordings, with the reason
        self.warnings: list[str] = []
        paths, metadata = self._walk()
        if not paths:
            kinds = " ".join(sorted(SOUNDFILE_EXTENSIONS | FFMPEG_EXTENSIONS))
            raise UserError(f"There are no recordings in {folder} (looked for {kinds}).")
        self.features, rows = self._read_metadata(metadata, set(paths))
        if "label" not in self.features:
            parents = {name: name.split("/")[0] for name in paths if "/" in name}
            if len(parents) == len(paths) and len(set(parents.values())) > 1:
                classes = ClassLabel(names=sorted(set(parents.values())))
                self.features["label"] = classes
                for name, label in parents.items():
                    rows.setdefault(name, {})["label"] = classes.str2int(label)
        nothing = dict.fromkeys(self.features)
        self._recordings = [
            Recording(name, path, _size(path), nothing | rows.get(name, {})) for name, path in paths.items()
        ]

    def __len__(self) -> int:
        return len(self._recordings)

    def __iter__(self) -> Iterator[Recording]:
        return iter(self._recordings)

    def _walk(self) -> tuple[dict[str, Path], list[Path]]:
        paths, metadata = {}, []

        def unreadable(error: OSError) -> None:
            self.rejects.append((Path(error.filename).relative_to(self.folder).as_posix(), f"{error.strerror}"))

        for parent, folders, files in os.walk(self.folder, onerror=unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in sorted(name for name in files if not name.startswith(".")):
                path = Path(parent, file)
                name = path.relative_to(self.folder).as_posix()
                if (readable := name.encode(errors="replace").decode()) != name:
                    self.rejects.append((printable(readable), "has a name that is not UTF-8: rename it"))
                elif printable(name) != name:
                    self.rejects.append((printable(name), "has a name with control characters: rename it"))
                elif is_special(path):
                    self.rejects.append((name, NOT_A_FILE))
                elif path.suffix.lower() in SOUNDFILE_EXTENSIONS | FFMPEG_EXTENSIONS:
                    paths[name] = path
                elif file in METADATA_FILES:
                    metadata.append(path)
                elif not file.upper().startswith(("README", "LICENSE", "LICENCE")):
                    self.rejects.append((name, f"is not audio by its name ({path.suffix or 'no extension'})"))
        return dict(sorted(paths.items())), metadata

    def _read_metadata(self, files: list[Path], names: set[str]) -> tuple[Features, dict[str, dict[str, Any]]]:
        """The columns that metadata files give, and their values by the name of the recording."""
        types: dict[str, Any] = {}
        rows: dict[str, dict[str, Any]] = {}
        unknown, repeated = [], []
        for file in files:
            table = _read_table(file)
            base = file.parent.relative_to(self.folder)
            for row in table.to_pylist():
                name = os.path.normpath(base / str(row.pop("file_name"))).replace(os.sep, "/")
                if name not in names:
                    unknown.append(name)
                    continue
                if name in rows:
                    repeated.append(name)
                rows[name] = row
            for column in table.drop_columns("file_name").schema:
                kind = types.setdefault(column.name, column.type)
                if pa.types.is_null(kind):
                    types[column.name] = column.type
                elif kind != column.type and not pa.types.is_null(column.type):
                    raise UserError(
                        f"{file}: column {column.name!r} is {column.type}, elsewhere {kind}: make them alike."
                    )
        if unknown:
            self.warnings.append(f"{len(unknown)} rows of metadata name no file, the first one {unknown[0]}")
        if repeated:
            self.warnings.append(f"{len(repeated)} rows of metadata replace an earlier one, the first {repeated[0]}")
        if files and len(rows) < len(names):
            first = min(names - rows.keys())
            self.warnings.append(f"{len(names) - len(rows)} files have no row of metadata, the first one {first}")
        strings = pa.string()  # of columns without any value
        features = Features(
            {
                name: generate_from_arrow_type(strings if pa.types.is_null(kind) else kind)
                for name, kind in types.items()
            }
        )
        if "label" in types:
            labels = {row["label"] for row in rows.values()} - {None}
            classes = ClassLabel(names=[str(label) for label in sorted(labels)])
            features["label"] = classes
            for row in rows.values():
                row["label"] = None if row["label"] is None else classes.str2int(str(row["label"]))
        return features, rows


def _read_table(file: Path) -> pa.Table:
    """A file of metadata, if it is a plain table."""
    try:
        content = file.read_bytes()
        if file.suffix == ".csv":
            columns = content.lstrip().replace(b"\r", b"\n").split(b"\n", 1)[0].count(b",") + 1
            if columns <= MOST_COLUMNS:
                options = pa.csv.ParseOptions(newlines_in_values=True)
                table = pa.csv.read_csv(pa.BufferReader(content), parse_options=options)
        else:
            if _depth(content) > MOST_DEPTH:  # Arrow itself does not survive it
                raise UserError(f"{file} cannot be read: it is nested more than {MOST_DEPTH} deep.")
            table = pa.json.read_json(pa.BufferReader(content))
            columns = table.num_columns
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if columns > MOST_COLUMNS:
        raise UserError(f"{file} has {columns} columns: leave all but the {MOST_COLUMNS} out that matter most.")
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise UserError(f"{file} has two columns {name!r}: rename one of them.")
    for column in table.schema:
        if pa.types.is_binary(column.type):
            raise UserError(f"{file}: column {column.name!r} is not UTF-8 text: save the file as UTF-8.")
        if column.name == "label" and pa.types.is_nested(column.type):
            raise UserError(f"{file}: column 'label' is {column.type}: a label is a text or a number.")
    if "file_name" not in table.column_names:
        raise UserError(f"{file} has no column 'file_name'; its columns are {', '.join(table.column_names)}.")
    return table


def _depth(content: bytes) -> int:
    """How deeply the objects and arrays of a JSON text are nested."""
    depth = deepest = 0
    for sign in re.finditer(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', content, re.DOTALL):
        depth += sign[0] in (b"[", b"{")
        depth -= sign[0] in (b"]", b"}")
        deepest = max(deepest, depth)
    return deepest


class AudioColumn:
    """The recordings of a dataset with an audio column, from the Hub or from disk, in the order they come in."""

    def __init__(self, dataset: Dataset | IterableDataset, column: str):
        features = dataset.features
        if features is None or column not in features:
            raise UserError(f"The dataset has no column {column!r}; its columns are {', '.join(features or ())}.")
        kind = features[column]
        if not isinstance(kind, (Audio, dict)) and getattr(kind, "dtype", None) not in ("string", "binary"):
            raise UserError(f"Column {column!r} holds no audio but {kind}: name another one with --audio_column.")
        others = {name: kind for name, kind in features.items() if name != column}
        self.features = Features(
            {name: kind for name, kind in others.items() if isinstance(kind, (Value, ClassLabel))}
        )
        self.rejects: list[tuple[str, str]] = []
        self.warnings = [f"column {name!r} is left out" for name in others if name not in self.features]
        self._column = column
        # Decoding is ours: the library's own needs a package that has no build for many machines.
        self._dataset = dataset.select_columns([column, *self.features]).cast_column(column, Audio(decode=False))

    def __iter__(self) -> Iterator[Recording]:
        for index, row in enumerate(self._rows()):
            audio = row.pop(self._column) or {}
            data, path = audio.get("bytes"), audio.get("path")
            source = data or (Path(path) if path else None)
            yield Recording(Path(path or f"{index:08d}").name, source, len(data or b""), row)

    def _rows(self) -> Iterator[Any]:
        try:
            yield from self._dataset
        except ImportError:
            raise UserError(f"The dataset cannot be streamed: {LOOSE_FILES}") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere, say: reading it will tell
        return 0
