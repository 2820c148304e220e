"""The files of a case, each opened once: what checks, loads, places and saves it asks here.

open -> hash -> header, checked -> voxels -> closed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from nibabel.affines import apply_affine

from regpipe.io import background, images, labels
from regpipe.io.formats import locate
from regpipe.io.images import Image, PathLike
from regpipe.io.landmarks import Landmarks, named_landmarks, placed, stored_affine
from regpipe.io.planes import Plane, standing
from regpipe.utils.files import opened, sha256, sha256_of


class Source:
    """What the files of one case hold, read when it is first asked for and kept until ``let_go``.

    Make one for each case: with it goes all that it holds. The methods raise what the readers raise.

    Args:
        hashed: whether the hash of each file is taken when it is read; else it is read again for that.
    """

    def __init__(self, *, hashed: bool = False) -> None:
        self.hashed = hashed
        self._kept: dict[PathLike, dict[Any, Any]] = {}
        self._hashes: dict[PathLike, str] = {}

    def image(self, path: PathLike) -> Image:
        """``io.images.read_image``, what is no data (NaN) as ``background.filled`` has it."""
        image: Image = self.read(path, images.read_image)
        kept = self._kept[path]
        if "filled" not in kept:
            kept["filled"] = background.filled(image)
        return cast(Image, kept["filled"])

    def known(self, path: PathLike) -> np.ndarray | None:
        """Where an image holds data, (*S) bool; None where it does everywhere."""
        return background.known(self.read(path, images.read_image).array)

    def label(
        self, path: PathLike, landmark_channels: int | None = None, *, image: PathLike | None = None
    ) -> tuple[Image, np.ndarray | None]:
        """``io.labels.read_label``; on the grid of its ``image`` where ``io.labels.laid_on`` can lay it there."""
        found: tuple[Image, np.ndarray | None] = self.read(path, labels.read_label, landmark_channels=landmark_channels)
        label, points = found
        if image is None:
            return found
        shape, affine = self.header(image)
        if len(shape) == 3 and label.plane is not None:  # one slice of a volume
            label = standing(label)
        if label.array.ndim != len(shape) or (
            shape == label.array.shape and np.allclose(affine, label.affine, atol=1e-3)
        ):
            return found
        laid = labels.laid_on(label, shape, affine)
        if laid is None:
            return found
        return laid, None if points is None else apply_affine(np.linalg.inv(affine) @ label.affine, points)

    def landmarks(self, path: PathLike, image: PathLike) -> Landmarks:
        """``io.landmarks.named_landmarks`` of an image, in LPS mm."""
        found: Landmarks = self.read(path, named_landmarks)
        plane = self.plane(image) if found.points.shape[1] == 3 else None
        if not (found.voxels or found.flat or plane is not None):
            return found
        affine = self.read(image, stored_affine) if found.voxels else None
        return placed(found, len(self.header(image)[0]), affine, plane)

    def plane(self, path: PathLike) -> Plane | None:
        """``io.images.plane_of``."""
        image = self._kept.get(path, {}).get((images.read_image,))
        found: Plane | None = image.plane if image else self.read(path, images.plane_of)
        return found

    def header(self, path: PathLike) -> tuple[tuple[int, ...], np.ndarray]:
        """``io.images.header``; without another look at a file whose image is known."""
        image = self._kept.get(path, {}).get((images.read_image,))
        found: tuple[tuple[int, ...], np.ndarray]
        found = (image.array.shape, image.affine) if image else self.read(path, images.header)
        return found

    def read(self, path: PathLike, reader: Callable[..., Any], **how: Any) -> Any:
        """What ``reader(path, file, **how)`` gives, or gave; ``file``: open, None of a folder with a DICOM series."""
        kept, key = self._kept.setdefault(path, {}), (reader, *how.items())
        if key not in kept:
            where, _ = locate(path)
            if where.is_dir():
                kept[key] = reader(path, None, **how)
                return kept[key]
            with opened(where) as file:
                if self.hashed and path not in self._hashes:
                    self._hashes[path] = sha256_of(file)
                    file.seek(0)
                kept[key] = reader(path, file, **how)
        return kept[key]

    def sha256(self, path: PathLike) -> str:
        """Of the bytes of a file; of a series of all files."""
        if path not in self._hashes:
            self._hashes[path] = sha256(images.files(path))
        return self._hashes[path]

    def let_go(self, path: PathLike) -> None:
        """Forget what a file holds, but not its hash."""
        self._kept.pop(path, None)
