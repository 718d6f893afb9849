"""Marks of generated images: C2PA signatures, the invisible watermark, and files without prompts or marks."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import PrivateFormat
from PIL import Image, ImageDraw
from scipy.stats import binom

from batch_infer import __version__, images
from batch_infer.errors import SettingsError
from batch_infer.provenance import MIN_SIDE, Marker, check_marks, has_watermark, is_signed
from batch_infer.provenance.watermark import _BITS, _MIN_MATCHES, _make_pattern, add_watermark, count_matches
from batch_infer.records import Verdict
from batch_infer.settings import C2paSigner, ImageFormat, OnFlagged, ProvenanceSettings, parse_marks
from tests.certificates import SigningFiles, encode_key, write_signing_files
from tests.runs import assert_whole, command, results, run, run_json
from tests.tables import write_csv

c2pa = pytest.importorskip("c2pa")
pytest.importorskip("wmforge")

FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
PROMPT = "a red circle"
SIGNED = ("--provenance", "iptc,c2pa")
WATERMARKED = ("--provenance", "iptc,watermark", "--height", "256", "--width", "256", "--steps", "1")
SOURCE_TYPE = b"digitalsourcetype/trainedAlgorithmicMedia"
IPTC = b"Iptc4xmpExt:DigitalSourceType"
FLAGGED = Verdict(nsfw=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[list[Any]] = [["id", "prompt", "seed"], ["a", PROMPT, 1], ["b", PROMPT, 1]]
    return write_csv(tmp_path_factory.mktemp("tables") / "t.csv", rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SigningFiles:
    return write_signing_files(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(table: Path, files: SigningFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("signed") / "out"
    assert run(table, out, *SIGNED, *files.options).code == 0
    return out


def contents(out: Path) -> Iterator[bytes]:
    for row in results(out):
        yield (out / row["generated_image"]).read_bytes()


def read_manifest(content: bytes, image_format: str, files: SigningFiles) -> tuple[str | None, dict[str, Any]]:
    """Return c2pa's verdict on a file, with the root certificate as trust anchor, and its active manifest."""
    context = c2pa.Context.from_dict({"trust": {"trust_anchors": files.root}})
    reader = c2pa.Reader(f"image/{image_format}", io.BytesIO(content), context=context)
    return reader.get_validation_state(), reader.get_active_manifest()


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_image_of_a_run_has_a_valid_signature(
    table: Path, files: SigningFiles, tmp_path: Path, image_format: ImageFormat
) -> None:
    options = (*SIGNED, *files.options, "--image-format", image_format)
    assert run(table, tmp_path / "out", *options).code == 0
    assert_whole(tmp_path / "out")
    model = run_json(tmp_path / "out")["model"]
    for content in contents(tmp_path / "out"):
        state, manifest = read_manifest(content, image_format, files)
        assert state == "Trusted"
        generator = manifest["claim_generator_info"][0]
        assert (generator["name"], generator["version"]) == ("batch-infer", __version__)
        (action,) = manifest["assertions"][0]["data"]["actions"]
        assert action["action"] == "c2pa.created"
        assert action["digitalSourceType"].encode().endswith(SOURCE_TYPE)
        assert action["softwareAgent"] == {"name": "batch-infer", "version": __version__}
        assert action["parameters"] == {"model": model["name"], "model_hash": model["fingerprint"]}
        assert IPTC in content, "both marks are in one file"
        assert Image.open(io.BytesIO(content)).format == image_format.upper()


def test_equal_rows_have_equal_pixels_but_other_signatures(signed: Path, table: Path, tmp_path: Path) -> None:
    assert run(table, tmp_path / "unsigned").code == 0
    rows, unsigned_rows = results(signed), results(tmp_path / "unsigned")
    assert len({row["sha256"] for row in rows}) == 2
    assert {row["pixels_sha256"] for row in rows} == {row["pixels_sha256"] for row in unsigned_rows}
    assert [row["fingerprint"] for row in rows] == [row["fingerprint"] for row in unsigned_rows]
    assert run_json(signed)["identity"] == run_json(tmp_path / "unsigned")["identity"]


def test_a_changed_pixel_invalidates_the_signature(signed: Path, files: SigningFiles) -> None:
    content = next(contents(signed))
    assert read_manifest(content, "png", files)[0] == "Trusted"
    start = content.index(b"IDAT") + 20
    changed = content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :]
    assert read_manifest(changed, "png", files)[0] == "Invalid"


def test_run_json_records_the_marks_but_not_the_files_of_the_signer(
    signed: Path, files: SigningFiles, table: Path, tmp_path: Path
) -> None:
    assert run_json(signed)["settings"]["output"]["provenance"] == {
        "marks": ["iptc", "c2pa"], "prompt_metadata": True, "signer": None
    }  # fmt: skip
    assert files.key.name not in (signed / "run.json").read_text()
    assert run(table, tmp_path / "out").code == 0
    assert "provenance" not in run_json(tmp_path / "out")["settings"]["output"], "as before the option existed"


def test_a_signed_run_has_nothing_left_to_do(signed: Path, files: SigningFiles, table: Path) -> None:
    before = list(contents(signed))
    done = run(table, signed, *SIGNED, *files.options, "--json")
    assert (done.code, list(contents(signed))) == (0, before)


def test_retry_and_rescore_sign_again(signed: Path, files: SigningFiles, tmp_path: Path) -> None:
    shutil.copytree(signed, tmp_path / "out")
    out, row = tmp_path / "out", results(signed)[0]
    before = list(contents(out))
    (out / row["generated_image"]).unlink()
    lines: list[tuple[str | Path, ...]] = [
        ("retry", out, "--status", "missing"),
        ("rescore", out, "--safety", "checker", "--on-flagged", "blur"),
    ]
    for line in lines:
        refused = command(*line)
        assert refused.code == 2
        assert (
            "--provenance c2pa needs --c2pa-cert FILE and --c2pa-key FILE; run.json does not record" in refused.stderr
        )
    assert command(*lines[0], *files.options).code == 0
    assert results(out)[0]["pixels_sha256"] == row["pixels_sha256"]
    with mock.patch("batch_infer.jobs.rescorer.Rescorer._check_images", lambda _, pixels: [FLAGGED] * len(pixels)):
        assert command(*lines[1], *files.options).code == 0
    assert {row["status"] for row in results(out)} == {"flagged"}
    assert_whole(out)
    for old, content in zip(before, contents(out), strict=True):
        assert read_manifest(content, "png", files)[0] == "Trusted"
        assert images.hash_pixels(images.decode(content)) != images.hash_pixels(images.decode(old)), "it is blurred"


def test_a_signed_sample_is_reproduced_and_equal(signed: Path, table: Path, tmp_path: Path, probe_here: None) -> None:
    done = command("verify", signed, "--sample", "2", "--json")
    assert done.code == 0, done.stdout
    assert run(table, tmp_path / "unsigned").code == 0
    done = command("diff", signed, tmp_path / "unsigned")
    assert "pixels are equal" in done.stdout
    assert "largest difference" not in done.stdout


def test_unusable_files_are_refused_before_anything_is_rendered(
    files: SigningFiles, table: Path, tmp_path: Path
) -> None:
    key = generate_private_key(SECP256R1())
    (tmp_path / "text.pem").write_text("no key")
    (tmp_path / "other.pem").write_bytes(encode_key(key))
    (tmp_path / "encrypted.pem").write_bytes(encode_key(key, passphrase=b"x"))
    (tmp_path / "traditional.pem").write_bytes(encode_key(key, PrivateFormat.TraditionalOpenSSL))
    (tmp_path / "expired").mkdir()
    expired = write_signing_files(tmp_path / "expired", expired=True)
    messages = [
        (files.chain, tmp_path / "none.pem", "No such file"),
        (tmp_path / "none.pem", files.key, "No such file"),
        (tmp_path / "text.pem", files.key, "is not a certificate in PEM format"),
        (files.chain, tmp_path / "text.pem", "is not a private key in PEM format"),
        (files.chain, tmp_path / "encrypted.pem", "is encrypted: use a key without a passphrase"),
        (files.chain, tmp_path / "traditional.pem", "is not in PKCS #8: convert it with `openssl pkcs8"),
        (files.chain, tmp_path / "other.pem", "cannot sign: the signature does not match"),
        (expired.chain, expired.key, "cannot sign: the certificate was not valid at time of signing"),
    ]
    for chain, key_file, message in messages:
        done = run(table, tmp_path / "out", *SIGNED, "--c2pa-cert", chain, "--c2pa-key", key_file)
        assert (done.code, message in done.stderr) == (2, True), done.stderr
    options = {
        SIGNED: "--provenance c2pa needs --c2pa-cert FILE and --c2pa-key FILE",
        (*SIGNED, "--c2pa-key", "k"): "--c2pa-key needs --c2pa-cert",
        ("--c2pa-key", "k", "--c2pa-cert", "c"): "need --provenance c2pa",
        (*SIGNED, "--c2pa-key", "~no-user/k", "--c2pa-cert", "c"): "--c2pa-key ~no-user/k: no such user",
        ("--provenance", "iptc,xmp"): "'xmp' is not a mark; give iptc, c2pa, watermark",
        ("--provenance", "iptc,none"): "`none` cannot be combined with other marks",
    }
    for line, message in options.items():
        done = run(table, tmp_path / "out", *line)
        assert (done.code, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_home_folder_is_expanded(
    files: SigningFiles, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(files.key.parent))
    options = ("--c2pa-cert", f"~/{files.chain.name}", "--c2pa-key", f"~/{files.key.name}")
    assert run(table, tmp_path / "out", *SIGNED, *options).code == 0
    assert all(map(is_signed, contents(tmp_path / "out")))


def test_a_renewed_certificate_is_read(tmp_path: Path) -> None:
    pixels = next(paint(1, 64))

    first = write_signing_files(tmp_path)
    settings = ProvenanceSettings(("c2pa",), signer=C2paSigner(str(first.chain), str(first.key)))
    content = Marker(settings, "model", "hash").encode(pixels, "png", PROMPT)
    assert read_manifest(content, "png", first)[0] == "Trusted"
    renewed = write_signing_files(tmp_path)
    assert renewed.chain == first.chain
    content = Marker(settings, "model", "hash").encode(pixels, "png", PROMPT)
    assert read_manifest(content, "png", renewed)[0] == "Trusted"
    assert read_manifest(content, "png", first)[0] == "Valid", "the first root does not certify it"


def find_text(out: Path, text: str) -> list[Path]:
    """Return the files below a folder whose content contains a text."""
    return [path for path in out.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_no_file_of_out_names_the_key(signed: Path, files: SigningFiles, table: Path, tmp_path: Path) -> None:
    assert find_text(signed, files.key.name) == []
    lost = write_signing_files(tmp_path)

    def check_and_remove(settings: ProvenanceSettings) -> None:
        check_marks(settings)
        lost.key.unlink()

    with mock.patch("batch_infer.jobs.job.check_marks", check_and_remove):
        failed = run(table, tmp_path / "out", *SIGNED, *lost.options, "--num-processes", "1")
    assert (failed.code, "--c2pa-key: No such file" in failed.stderr) == (2, True), failed.stderr
    logs = find_text(tmp_path / "out", "--c2pa-key: No such file")
    assert {path.name for path in logs} == {"run.log", "worker-0.log"}
    assert "Traceback" in (tmp_path / "out/logs/worker-0.log").read_text()
    assert find_text(tmp_path / "out", lost.key.name) == []
    assert lost.key.name not in repr(ProvenanceSettings(signer=C2paSigner(str(lost.chain), str(lost.key))))


def test_unsigned_runs_refuse_a_signer(table: Path, files: SigningFiles, tmp_path: Path) -> None:
    assert run(table, tmp_path / "out").code == 0
    for line in (("retry", "--status", "missing"), ("rescore", "--safety", "checker")):
        done = command(line[0], tmp_path / "out", *line[1:], *files.options)
        assert done.code == 2
        assert "so its images are not signed: leave both options out" in done.stderr


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_prompt_is_not_taken_for_a_signature(image_format: ImageFormat, files: SigningFiles) -> None:
    """Prompts are stored as Latin-1, UTF-8 or UTF-16."""
    pixels = next(paint(1, 65))
    signer = C2paSigner(str(files.chain), str(files.key))
    for prompt in ("jumdc2pa caBX JP C2PA", "é jumdc2pa caBX C2PA", "红 jumdc2pa C2PA"):
        unsigned = images.encode(pixels, image_format, prompt)
        assert not is_signed(unsigned)
        marker = Marker(ProvenanceSettings(("iptc", "c2pa"), signer=signer), "model", "hash")
        assert is_signed(marker.encode(pixels, image_format, prompt))
    assert not is_signed(b"")
    assert not is_signed(unsigned[:20])


@pytest.mark.parametrize("options", [("--no-prompt-metadata",), ("--provenance", "none")])
def test_images_of_a_run_with_other_marks_are_reproduced(
    table: Path, tmp_path: Path, probe_here: None, options: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    assert run(table, out, "--limit", "1").code == 0
    assert "environments" not in run_json(out)
    assert run(table, out, *options).code == 0
    environments = run_json(out)["environments"]
    assert [environment.get("provenance") for environment in environments] == [
        None, run_json(out)["settings"]["output"]["provenance"]
    ]  # fmt: skip
    before = list(contents(out))
    done = command("verify", out, "--sample", "2", "--fix", "--json")
    assert done.code == 0, done.stdout
    sample = json.loads(done.stdout)["sample"]
    assert (sample["equal_bytes"], sample["equal_pixels"], sample["environment"]) == (1, 2, {})
    assert list(contents(out)) == before


@pytest.mark.parametrize(("library", "package"), [("c2pa", "c2pa-python"), ("wmforge", "'wmforge<0.2'")])
def test_without_a_library_the_message_names_the_package(
    table: Path, tmp_path: Path, files: SigningFiles, library: str, package: str
) -> None:
    from batch_infer.provenance import c2pa as signing
    from batch_infer.provenance import watermark

    options = {"c2pa": (*SIGNED, *files.options), "wmforge": WATERMARKED}[library]
    caches = (signing._make_context, watermark._load_codec)
    with mock.patch.dict("sys.modules", {library: None, f"{library}.core": None}):
        for cached in caches:
            cached.cache_clear()
        done = run(table, tmp_path / "out", *options)
    assert done.code == 2
    assert f"pip install {package}" in done.stderr


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_has_only_the_marks_of_its_run(image_format: ImageFormat, files: SigningFiles) -> None:
    pixels = next(iter(paint(1)))
    default = images.encode(pixels, image_format, PROMPT)

    def encode(marks: str, *, prompt_metadata: bool = True) -> bytes:
        settings = ProvenanceSettings(parse_marks(marks), prompt_metadata)
        return Marker(settings, "model", "hash").encode(pixels, image_format, PROMPT)

    assert encode("iptc") == default
    for content in (encode("none"), encode("watermark")):
        assert IPTC not in content
        assert has_prompt(content)
        assert not is_signed(content)
    content = encode("iptc", prompt_metadata=False)
    assert IPTC in content
    assert not has_prompt(content)
    assert len(encode("none", prompt_metadata=False)) < len(content) < len(default)
    assert np.array_equal(images.decode(content), images.decode(default))


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_run_without_prompt_metadata_stores_no_prompt(
    table: Path, files: SigningFiles, tmp_path: Path, image_format: ImageFormat
) -> None:
    options = ("--provenance", "c2pa", *files.options, "--no-prompt-metadata", "--image-format", image_format)
    assert run(table, tmp_path / "out", *options).code == 0
    for content in contents(tmp_path / "out"):
        assert not has_prompt(content)
        assert IPTC not in content
        assert is_signed(content)


def has_prompt(content: bytes) -> bool:
    return any(PROMPT.encode(encoding) in content for encoding in ("utf-8", "utf-16-be", "utf-16-le"))


def paint(count: int, side: int = 512) -> Iterator[np.ndarray]:
    """Yield varied images: gradients, clouds like photos, noise, shapes, lines on black or white, and tiles."""
    random = np.random.default_rng(0)
    for number in range(count):
        yield PAINTERS[number % len(PAINTERS)](random, side)


def _paint_gradient(random: np.random.Generator, side: int) -> np.ndarray:
    first, last = random.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, side)
    share = (ramp[None, :, None] * random.random() + ramp[:, None, None]) / 2
    return _to_pixels(first * (1 - share) + last * share)


def _paint_clouds(random: np.random.Generator, side: int) -> np.ndarray:
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequencies[0, 0] = 1
    spectrum = np.fft.rfft2(random.normal(size=(3, side, side))) / frequencies ** (1 + random.random())
    clouds = np.moveaxis(np.fft.irfft2(spectrum), 0, -1)
    return _to_pixels(255 * (clouds - clouds.min()) / np.ptp(clouds))


def _paint_noise(random: np.random.Generator, side: int) -> np.ndarray:
    return _to_pixels(random.normal(128, 40, (side, side, 3)))


def _paint_shapes(random: np.random.Generator, side: int) -> np.ndarray:
    return _draw(random, side, _random_color(random), lambda draw, box, color: draw.ellipse(box, fill=color))


def _paint_lines(random: np.random.Generator, side: int) -> np.ndarray:
    background = (255, 255, 255) if random.random() < 0.5 else (0, 0, 0)
    return _draw(random, side, background, lambda draw, box, color: draw.line(box, fill=color, width=3))


def _paint_tiles(random: np.random.Generator, side: int) -> np.ndarray:
    tiles = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return np.asarray(tiles.resize((side, side), Image.Resampling.BICUBIC))


def _draw(
    random: np.random.Generator,
    side: int,
    background: tuple[int, int, int],
    draw: Callable[[ImageDraw.ImageDraw, list[int], tuple[int, int, int]], None],
) -> np.ndarray:
    image = Image.new("RGB", (side, side), background)
    for _ in range(30):
        corners = np.sort(random.integers(0, side, (2, 2)), axis=0) + [[0, 0], [1, 1]]
        draw(ImageDraw.Draw(image), corners.flatten().tolist(), _random_color(random))
    return np.asarray(image)


def _random_color(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = random.integers(0, 256, 3).tolist()
    return red, green, blue


def _to_pixels(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.rint(values).clip(0, 255), np.uint8)


PAINTERS = (_paint_gradient, _paint_clouds, _paint_noise, _paint_shapes, _paint_lines, _paint_tiles)


def compress(pixels: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=75)
    return images.decode(stream.getvalue())


def halve(pixels: np.ndarray) -> np.ndarray:
    height, width, _ = pixels.shape
    return np.asarray(Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BICUBIC))


def check_robustness(pictures: Iterable[np.ndarray]) -> int:
    """Return the number of pictures, of which 99 % must keep a readable mark and none may have one before."""
    readable, psnr = [0, 0, 0], list[float]()
    for pixels in pictures:
        marked = add_watermark(pixels)
        psnr.append(images.compute_psnr(pixels, marked))
        assert count_matches(pixels) < _MIN_MATCHES
        for index, copy in enumerate((marked, halve(compress(marked)), compress(halve(marked)))):
            readable[index] += count_matches(copy) >= _MIN_MATCHES
    assert min(psnr) >= 38
    assert min(readable) >= 0.99 * len(psnr), (readable, len(psnr))
    return len(psnr)


def test_the_watermark_survives_compression_and_halving() -> None:
    assert check_robustness(paint(36)) == 36


@pytest.mark.promises
def test_the_watermark_survives_in_99_percent_of_images(table: Path, tmp_path: Path) -> None:
    rows = [["prompt"], *[[f"a {color} {shape}"] for color in ("red", "blue") for shape in ("circle", "square")]]
    assert run(write_csv(tmp_path / "r.csv", rows), tmp_path / "out", "--images-per-prompt", "15").code == 0
    renders = [
        np.asarray(Image.fromarray(images.decode(content)).resize((512, 512), Image.Resampling.BICUBIC))
        for content in contents(tmp_path / "out")
    ]
    assert check_robustness((*paint(240), *renders)) == 300


@pytest.mark.parametrize("size", [(256, 256), (256, 512), (768, 520), (1024, 1024)])
def test_the_watermark_does_not_depend_on_the_size(size: tuple[int, int]) -> None:
    pixels = np.ascontiguousarray(next(_skip(paint(2, max(size))))[: size[0], : size[1]])
    marked = add_watermark(pixels)
    assert marked.shape == pixels.shape
    assert min(count_matches(copy) for copy in (marked, halve(compress(marked)))) > _MIN_MATCHES


def _skip(pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    next(pictures)
    return pictures


def test_the_watermark_is_deterministic_and_the_same_in_every_version() -> None:
    for pixels in paint(6, 256):
        assert np.array_equal(add_watermark(pixels), add_watermark(pixels.copy()))
    pattern = hashlib.sha256(_make_pattern().tobytes()).hexdigest()
    assert pattern.startswith("3e41b95928bb9f6b"), "all readers compare with this pattern"
    grey = np.full((256, 256, 3), 128, np.uint8)
    assert np.unique(add_watermark(grey)).tolist() == [129, 130, 131], "1 or 3 levels, and interpolated between blocks"


def test_unmarked_images_are_read_as_unmarked() -> None:
    assert binom.sf(_MIN_MATCHES - 1, _BITS, 0.5) < 1e-6
    matches = [count_matches(pixels) for pixels in paint(60, 256)]
    matches += [count_matches(np.full((256, 256, 3), level, np.uint8)) for level in range(0, 256, 15)]
    assert max(matches) < _MIN_MATCHES - 20
    assert abs(float(np.mean(matches)) - _BITS / 2) < 10


@pytest.fixture(scope="module")
def watermarked(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("watermarked") / "out"
    assert run(table, out, *WATERMARKED).code == 0
    return out


def test_a_run_marks_all_images_with_a_watermark(watermarked: Path, probe_here: None) -> None:
    for content in contents(watermarked):
        assert has_watermark(content)
        assert IPTC in content
    assert_whole(watermarked)
    done = command("verify", watermarked, "--sample", "2", "--json")
    assert done.code == 0, done.stdout


def test_the_watermark_belongs_to_the_identity(watermarked: Path, table: Path, tmp_path: Path) -> None:
    plain = ("--height", "256", "--width", "256", "--steps", "1")
    assert run_json(watermarked)["identity"]["watermark"] == "dwtDctSvd 1"
    assert run_json(watermarked)["versions"]["wmforge"] == version("wmforge")
    done = run(table, watermarked, *plain)
    assert done.code == 2
    assert "was made with watermark dwtDctSvd 1, and this run has watermark none" in done.stderr
    assert run(table, tmp_path / "out", *plain).code == 0
    assert not any(map(has_watermark, contents(tmp_path / "out")))
    done = run(table, tmp_path / "out", *WATERMARKED)
    assert done.code == 2
    assert "was made with watermark none, and this run has watermark dwtDctSvd 1" in done.stderr


def test_images_too_small_for_the_watermark_are_refused(tmp_path: Path, table: Path) -> None:
    done = run(table, tmp_path / "out", "--provenance", "watermark")
    assert done.code == 2
    assert "--provenance watermark needs images of at least 256x256 pixels" in done.stderr
    assert not (tmp_path / "out" / "run.json").exists()
    rows: list[list[Any]] = [["prompt", "height"], [PROMPT, 128], [PROMPT, MIN_SIDE]]
    done = run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out", *WATERMARKED)
    assert done.code == 3
    invalid, valid = results(tmp_path / "out")
    assert (invalid["status"], valid["status"]) == ("invalid", "ok")
    assert invalid["error"].startswith("height '128' is not within 256 to")


@pytest.mark.parametrize("policy", get_args(OnFlagged))
def test_flagged_images_keep_a_readable_watermark(policy: OnFlagged) -> None:
    """A rescore gives the pixels that a run with the same policy stores. A black image shows nothing generated."""
    pixels = next(iter(paint(1)))
    marker = Marker(ProvenanceSettings(("watermark",)), "model", "hash")
    original, stored = marker.mark_pixels(pixels), marker.mark_pixels(pixels, policy)
    assert original is not None
    rescored = marker.replace_flagged(original, policy)
    if stored is None or rescored is None:
        assert policy == "drop" and stored is rescored is None
        return
    assert np.array_equal(stored, rescored)
    assert (count_matches(stored) >= _MIN_MATCHES) == (policy != "blank")
    assert stored.any() == (policy != "blank")


def test_a_signed_image_says_that_it_has_a_watermark(files: SigningFiles) -> None:
    from batch_infer.settings import C2paSigner

    settings = ProvenanceSettings(("c2pa", "watermark"), signer=C2paSigner(str(files.chain), str(files.key)))
    marker = Marker(settings, "model", "hash")
    pixels = marker.mark_pixels(next(iter(paint(1, 256))))
    assert pixels is not None
    content = marker.encode(pixels, "png", PROMPT)
    state, manifest = read_manifest(content, "png", files)
    assert state == "Trusted"
    actions = [action["action"] for action in manifest["assertions"][0]["data"]["actions"]]
    assert actions == ["c2pa.created", "c2pa.watermarked.unbound"]
    assert has_watermark(content)


def test_a_marker_without_a_signer_is_refused() -> None:
    with pytest.raises(SettingsError, match="run.json does not record them"):
        Marker(ProvenanceSettings(("c2pa",)), "model", "hash")
