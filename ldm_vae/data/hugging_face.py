"""Images in Hugging Face datasets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ldm_vae.data.image_files import digest_of, patiently
from ldm_vae.data.images import Sample
from ldm_vae.data.reader import ImageReader
from ldm_vae.errors import BadImageError, DataError


class HuggingFaceSource:
    """The image column of a Hugging Face dataset; labels from its ClassLabel column when it has one.

    Rows that name a file are read below `roots` alone: elsewhere they may name anything.
    """

    def __init__(self, dataset: Any, reader: ImageReader, *, roots: tuple[str | Path, ...] = ()) -> None:
        import datasets

        images = [k for k, v in dataset.features.items() if isinstance(v, datasets.Image)]
        labels = [k for k, v in dataset.features.items() if isinstance(v, datasets.ClassLabel)]
        if not images:
            raise DataError(f"the data set has no image column: its columns are {', '.join(dataset.column_names)}")
        self.image, self.label = images[0], labels[0] if labels else None
        self.classes: tuple[str, ...] = tuple(dataset.features[self.label].names) if self.label else ()
        self.dataset = dataset.cast_column(self.image, datasets.Image(decode=False))
        self.reader = reader
        self.roots = {name(root) for root in roots for name in (os.path.abspath, os.path.realpath)}

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{index:08d}"

    def fingerprint(self) -> str:
        """Of what the `datasets` library says its content is."""
        return digest_of([str(self.reader)], [self.dataset._fingerprint])

    def __getitem__(self, index: int) -> Sample:
        row = self.dataset[index]
        stored = row[self.image] or {}
        data, path = stored.get("bytes"), stored.get("path")
        if data is None and path:
            inside = any(Path(os.path.abspath(path)).is_relative_to(root) for root in self.roots)
            if not inside or not os.path.isfile(path):
                raise BadImageError("names a file that is not in the data set")
            data = patiently(Path(path).read_bytes, path)
        found = self.reader(data or b"")
        label = row[self.label] if self.label else None
        label = label if label is not None and label >= 0 else None  # the library's -1 is "not labelled"
        return self.reader.sample(found, label=label, name=self.name(index))


def hugging_face_source(path: str, reader: ImageReader) -> HuggingFaceSource:
    """A hub id, a parquet file, a folder of parquet files, what `save_to_disk` wrote, or imagefolder:FOLDER."""
    try:
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        raise DataError(f"{path} is a Hugging Face dataset: pip install 'ldm-vae[datasets]' to read it") from None
    local = Path(path)
    roots: tuple[str, ...] = ()
    try:
        if path.startswith("imagefolder:"):
            folder = path.removeprefix("imagefolder:")
            dataset = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
            roots = (folder,)
        elif local.is_file():
            dataset = datasets.load_dataset("parquet", data_files=str(local), split="train")
        elif (local / "state.json").is_file():
            dataset = datasets.load_from_disk(str(local))
        elif local.is_dir():
            dataset = datasets.load_dataset("parquet", data_dir=str(local), split="train")
        else:
            dataset = datasets.load_dataset(path, split="train")
            roots = (str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE)  # where the library puts files
    except Exception as error:  # the library raises many kinds: offline, unknown, damaged, no train split
        raise DataError(f"cannot load the Hugging Face dataset {path}: {type(error).__name__}: {error}") from None
    return HuggingFaceSource(dataset, reader, roots=roots)


def is_hugging_face_folder(path: Path) -> bool:
    return (path / "state.json").is_file() or any(path.glob("*.parquet")) or any((path / "data").glob("*.parquet"))
