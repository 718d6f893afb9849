"""Mark image files as generated: IPTC metadata, a signed C2PA manifest, and an invisible watermark in the pixels.

`has_watermark` reads the watermark of an image file.
"""

from batch_infer.provenance.c2pa import is_signed
from batch_infer.provenance.marker import Marker, check_marks, describe_watermark, list_libraries, restrict_sizes
from batch_infer.provenance.watermark import MIN_SIDE, has_watermark

__all__ = [
    "MIN_SIDE",
    "Marker",
    "check_marks",
    "describe_watermark",
    "has_watermark",
    "is_signed",
    "list_libraries",
    "restrict_sizes",
]
