"""Mark the image files of a run as generated."""

from __future__ import annotations

import numpy as np
from msgspec import structs

from batch_infer import images
from batch_infer.errors import SettingsError
from batch_infer.provenance.c2pa import Signer, make_manifest
from batch_infer.provenance.watermark import MIN_SIDE, VERSION, add_watermark, check_library
from batch_infer.records import SizeRules
from batch_infer.settings import ImageFormat, OnFlagged, ProvenanceSettings, RowDefaults


class Marker:
    """Makes image files with the marks of a run. Threads can share a marker."""

    def __init__(
        self, settings: ProvenanceSettings, model: str, fingerprint: str, *, names_files: bool = False
    ) -> None:
        """Load the libraries and the key that the marks need.

        `model` and `fingerprint` are the model's name and fingerprint, which only the C2PA manifest contains. Raises
        SettingsError, whose message contains the paths of the signer's files only with `names_files`.
        """
        self._settings = settings
        self._has_watermark = "watermark" in settings.marks
        if self._has_watermark:
            check_library()
        self._signer: Signer | None = None
        if "c2pa" in settings.marks:
            if settings.signer is None:
                raise SettingsError(
                    "--provenance c2pa needs --c2pa-cert FILE and --c2pa-key FILE; run.json does not record them, so "
                    "give them to each command that writes images"
                )
            self._signer = Signer(settings.signer, names_files=names_files)
        self._manifest = make_manifest(model, fingerprint, has_watermark=self._has_watermark)

    def mark_pixels(self, pixels: np.ndarray, on_flagged: OnFlagged | None = None) -> np.ndarray | None:
        """Return the pixels (H, W, 3) uint8 to store for a rendered image, or None to store no image.

        `on_flagged` is the policy if the image is flagged, and None otherwise. The policy receives the pixels with the
        watermark, as when a stored image is flagged later.
        """
        marked = add_watermark(pixels) if self._has_watermark else pixels
        return marked if on_flagged is None else self.replace_flagged(marked, on_flagged)

    def replace_flagged(self, marked: np.ndarray, on_flagged: OnFlagged) -> np.ndarray | None:
        """Apply the policy to a flagged image with the run's watermark, and keep the watermark readable.

        A black placeholder has none: it shows nothing generated.
        """
        pixels = images.apply_policy(marked, on_flagged)
        if pixels is not None and on_flagged == "blur" and self._has_watermark:
            return add_watermark(pixels)
        return pixels

    def encode(self, pixels: np.ndarray, image_format: ImageFormat, parameters: str) -> bytes:
        """Encode pixels (H, W, 3) uint8 as an image file, and sign it. Raises SettingsError if it cannot be signed."""
        text = parameters if self._settings.prompt_metadata else None
        content = images.encode(pixels, image_format, text, has_mark="iptc" in self._settings.marks)
        return content if self._signer is None else self._signer.sign(content, image_format, self._manifest)


def describe_watermark(settings: ProvenanceSettings) -> dict[str, str]:
    """Return the entry of a run's identity for the watermark, which changes every pixel, or no entry without it."""
    return {"watermark": VERSION} if "watermark" in settings.marks else {}


def list_libraries(settings: ProvenanceSettings) -> tuple[str, ...]:
    """Return the installed packages, besides those of every run, that decide the pixels of marked images."""
    return ("wmforge",) if "watermark" in settings.marks else ()


def check_marks(settings: ProvenanceSettings) -> None:
    """Raise SettingsError if images cannot be marked: a library or a file of the signer is missing or unusable.

    The message contains the paths of the signer's files, so call this before the log in OUT is opened.
    """
    Marker(settings, "", "", names_files=True)


def restrict_sizes(settings: ProvenanceSettings, sizes: SizeRules, defaults: RowDefaults) -> SizeRules:
    """Return the sizes of images that a model can render and this run can mark.

    Raises SettingsError if the default size is none of them.
    """
    smallest = -(-MIN_SIDE // sizes.side_multiple) * sizes.side_multiple
    if "watermark" not in settings.marks or sizes.min_side >= smallest:
        return sizes
    if min(defaults.height or 0, defaults.width or 0) < smallest:
        raise SettingsError(
            f"--provenance watermark needs images of at least {smallest}x{smallest} pixels, and the default size is "
            f"{defaults.width}x{defaults.height}: give --height and --width, or leave out watermark"
        )
    return structs.replace(sizes, min_side=smallest)
