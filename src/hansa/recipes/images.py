# SPDX-License-Identifier: Apache-2.0
"""Images as a model takes them: resized, cropped and normalised as its ``preprocessor_config.json`` says.

Only Pillow is used. A base without that file, or a model from scratch, gets its config's ``image_size`` and values
from −1 to 1.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hansa.core import storage
from hansa.core.config import Job
from hansa.errors import DataError, JobError, ModelError
from hansa.recipes import pretrained
from hansa.recipes.tables import Table

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageProcessor:
    """How an image becomes pixels.

    Attributes:
        height: pixels.
        width: pixels.
        channels: 1 (grey) or 3 (red, green, blue).
        mean: for each channel, subtracted after scaling to [0, 1].
        std: for each channel, divided by.
        shortest_edge: resize to this shortest edge and crop the centre; None resizes to height and width.
        resample: Pillow's number of the filter.
        kind: the name of the ``transformers`` class that the file is for.
    """

    height: int
    width: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    shortest_edge: int | None = None
    resample: int = int(Image.Resampling.BILINEAR)
    kind: str = "ViTImageProcessor"

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return uint8 pixels (channels, height, width)."""
        image = image.convert(_MODES[self.channels])
        filter_ = Image.Resampling(self.resample)
        if self.shortest_edge is None:
            image = image.resize((self.width, self.height), filter_)
        else:
            wide, high = (self.shortest_edge * side // min(image.size) for side in image.size)
            left, top = (wide - self.width) // 2, (high - self.height) // 2
            image = image.resize((wide, high), filter_).crop((left, top, left + self.width, top + self.height))
        array = np.asarray(image, np.uint8)
        return array[None] if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def save_pretrained(self, directory: Path) -> None:
        """Write ``preprocessor_config.json``, from which ``transformers`` makes the same pixels."""
        whole = {"height": self.height, "width": self.width}
        settings = {
            "image_processor_type": self.kind,
            "do_resize": True,
            "size": whole if self.shortest_edge is None else {"shortest_edge": self.shortest_edge},
            "resample": self.resample,
            "do_center_crop": self.shortest_edge is not None,
            "crop_size": whole,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.channels == 3,
        }
        storage.write_json(directory / "preprocessor_config.json", settings)


def load_processor(job: Job) -> ImageProcessor:
    """Return the processor that belongs to the job's model.

    Raises:
        JobError: the model's config does not tell the size of images.
        ModelError: the base, or its preprocessor file, can't be read, or it wants neither 1 nor 3 channels.
    """
    if job.model.base is None:
        return _from_config(pretrained.scratch_config(job, {}, None))
    base = pretrained.locate(job, job.model.base)
    with pretrained.explained(base, "base model"):
        config = transformers.AutoConfig.from_pretrained(base.where, **base.options)
    plain = _from_config(config)
    path = transformers.utils.cached_file(
        base.where,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **base.options,
    )
    if path is None:
        return plain
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}.") from None
    return _from_settings(settings, plain)


def _from_config(config: Any) -> ImageProcessor:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise JobError("The model's config has no image_size: set model.config.image_size, or use a vision model.")
    channels = getattr(config, "num_channels", 3)
    if channels not in _MODES:
        raise ModelError(f"The model takes images of {channels} channels; only 1 and 3 are supported.")
    half = (0.5,) * channels
    return ImageProcessor(int(size[0]), int(size[1]), channels, half, half)


def _from_settings(settings: Mapping[str, Any], plain: ImageProcessor) -> ImageProcessor:
    size = settings.get("size", {})
    size = {"height": size, "width": size} if isinstance(size, int) else size
    crop = settings.get("crop_size", {})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    edge = size.get("shortest_edge")
    target = crop if edge else size
    normalised = settings.get("do_normalize", True)
    return ImageProcessor(
        int(target.get("height", plain.height)),
        int(target.get("width", plain.width)),
        plain.channels,
        settings.get("image_mean", plain.mean) if normalised else (0.0,) * plain.channels,
        settings.get("image_std", plain.std) if normalised else (1.0,) * plain.channels,
        edge,
        settings.get("resample", plain.resample),
        settings.get("image_processor_type", plain.kind).removesuffix("Fast"),
    )


def open_image(table: Table, index: int, value: Any) -> Image.Image:
    """Return the image in one cell: a path, a Pillow image, bytes, or a uint8 array (h, w) or (h, w, channels).

    Raises:
        DataError: it is none of these, or can't be read; file and row are named.
    """
    try:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str | Path):
            return _read(table.folder(index) / value)
        if isinstance(value, bytes):
            return _read(io.BytesIO(value))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{table.where(index)}: the image can't be read: {error}.") from None
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and (value.ndim == 2 or value.shape[2:] == (3,)):
        return Image.fromarray(value)
    got = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    raise DataError(
        f"{table.where(index)}: 'image' must be a path, an encoded image, or uint8 pixels (h, w) or (h, w, 3); it is "
        f"{got}. Set data.columns.image to the column that holds images."
    )


def _read(file: Path | io.BytesIO) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image
