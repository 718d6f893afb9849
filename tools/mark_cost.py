"""Measure the CPU time of marking a 512x512 image.

`python -m tools.mark_cost --c2pa-cert FILE --c2pa-key FILE`; docs/provenance.md says how to make a test certificate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from batch_infer.provenance import Marker
from batch_infer.settings import C2paSigner, ProvenanceSettings

REPETITIONS = 100
SIDE = 512
PROMPT = "a red circle\nSteps: 20, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 1, Size: 512x512"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--c2pa-cert", required=True, metavar="FILE")
    parser.add_argument("--c2pa-key", required=True, metavar="FILE")
    arguments = parser.parse_args()
    signer = C2paSigner(arguments.c2pa_cert, arguments.c2pa_key)
    plain = Marker(ProvenanceSettings(), "model", "hash")
    signing = Marker(ProvenanceSettings(("iptc", "c2pa"), signer=signer), "model", "hash")
    watermarking = Marker(ProvenanceSettings(("watermark",)), "model", "hash")
    pixels = make_picture()
    seconds = {
        "encode PNG": measure(lambda: plain.encode(pixels, "png", PROMPT)),
        "encode PNG and sign": measure(lambda: signing.encode(pixels, "png", PROMPT)),
        "watermark": measure(lambda: watermarking.mark_pixels(pixels)),
    }
    for name, value in seconds.items():
        print(f"{name:20} {1000 * value:6.1f} ms of CPU time per {SIDE}x{SIDE} image, median of {REPETITIONS}")
    size = len(signing.encode(pixels, "png", PROMPT)) - len(plain.encode(pixels, "png", PROMPT))
    print(f"a signature adds {size:,} bytes")


def make_picture() -> np.ndarray:
    """Return smooth clouds, which a PNG compresses about as well as a photo."""
    random = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequencies[0, 0] = 1
    clouds = np.moveaxis(np.fft.irfft2(np.fft.rfft2(random.normal(size=(3, SIDE, SIDE))) / frequencies**1.5), 0, -1)
    return np.asarray(255 * (clouds - clouds.min()) / np.ptp(clouds), np.uint8)


def measure(function: Callable[[], object]) -> float:
    """Return the median CPU time of a call in seconds, which other processes hardly change."""
    function()
    durations = []
    for _ in range(REPETITIONS):
        started = time.process_time()
        function()
        durations.append(time.process_time() - started)
    return statistics.median(durations)


if __name__ == "__main__":
    main()
