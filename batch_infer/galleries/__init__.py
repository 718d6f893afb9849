"""Write a gallery: a static page with thumbnails, and the results as scripts that the page loads.

The page opens from disk, where browsers refuse `fetch`, so every data file is a script that calls
`BatchInferGallery.receive`. Callers pass the results as tables and the images as an object that reads them.
"""

from batch_infer.galleries.snapshot import Snapshot
from batch_infer.galleries.tiles import Images, TileOptions
from batch_infer.galleries.writer import MARK, GalleryInfo, GalleryTotals, is_gallery, write_gallery

__all__ = [
    "GalleryInfo",
    "GalleryTotals",
    "Images",
    "MARK",
    "Snapshot",
    "TileOptions",
    "is_gallery",
    "write_gallery",
]
