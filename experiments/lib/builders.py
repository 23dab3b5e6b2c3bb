"""Builders for tensorflow-datasets that write array_record, and arrays of their records.

The library's own builders need TensorFlow to gunzip, to read files and to write PNG. These use
Python's gzip and open, and Pillow, instead.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray

from experiments.lib import options
from experiments.lib.cache import Arrays

Examples = Iterable[tuple[Any, Any]]
"""Pillow images and their labels."""


def builder(
    called: str,
    version: Any,
    shape: tuple[int, ...],
    n_classes: int,
    parts: Callable[[Any], dict[str, Examples]],
) -> Any:
    """Return a builder of labelled images, in the order of their files.

    Args:
      called: name of the builder.
      version: version of the data.
      shape: shape of the images.
      n_classes: number of classes.
      parts: maps a download manager to the examples of `train` and `test`.
    """
    with tfds.core.registered.skip_registration():

        class Images(tfds.core.GeneratorBasedBuilder):
            """Labelled images."""

            name = called
            VERSION = tfds.core.Version(version)

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Image(shape=shape),
                    "label": tfds.features.ClassLabel(num_classes=n_classes),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
                found = parts(dl_manager).items()
                return {part: self._generate_examples(examples) for part, examples in found}

            def _generate_examples(self, examples: Examples) -> Iterator[tuple[int, Any]]:
                for i, (image, label) in enumerate(examples):
                    yield i, {"image": image, "label": int(label)}

    return Images


def prepared(make: Callable[..., Any], folder: Path, **download: Any) -> Arrays:
    """Prepare a builder's records in a folder, and read them.

    Args:
      make: the builder's class, or a function with the same arguments.
      folder: where the records go.
      **download: arguments of `tfds.download.DownloadConfig`.

    Raises:
      UsageError: if there is no split `train` or no split `test`.
    """
    # Left by an interrupted preparation, or the source of damaged arrays.
    if folder.exists():
        shutil.rmtree(folder)
    made = make(data_dir=folder, file_format="array_record")
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(**download))
    if not {"train", "test"} <= set(made.info.splits):
        raise options.UsageError(
            f"expected splits train and test, got {sorted(made.info.splits)}; write the images "
            "as a folder with these two"
        )

    def arrays(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        source = made.as_data_source(split=part)
        images = np.empty((len(source), *made.info.features["image"].shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        # In blocks, which takes half as long as one record at a time.
        for start in tfds.core.utils.tqdm(range(0, len(source), 1000), f"Reading {part} records"):
            block = slice(start, min(start + 1000, len(source)))
            records = source.__getitems__(range(block.start, block.stop))
            images[block] = [record["image"] for record in records]
            labels[block] = [record["label"] for record in records]
        return images, labels

    return Arrays(*arrays("train"), *arrays("test"))
