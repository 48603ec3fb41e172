"""Files that are small and would take all memory, or minutes: refused by what they say, or by what they come to."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

import data.sources.parquet
from data.sources.decode import MAX_SCANS, decode_image
from tests.helpers.pictures import opened


def png(width: int, height: int) -> bytes:
    """Of 16 bits, all of one grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width), 40_000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=True)
    return buffer.getvalue()


def test_a_list_of_classes_that_unpacks_to_gigabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.png", png(8, 8))
        archive.writestr("classes.txt", bytes(2**25))
    assert (tmp_path / "a.zip").stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"classes\.txt: 33,554,432 bytes, over the limit"):
        opened(tmp_path / "a.zip")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_tar_whose_header_says_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 2**30
    (tmp_path / "a.tar").write_bytes(header.tobuf() + bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.tar: ValueError: a header of 1,073,741,824 bytes, over the limit"):
        opened(tmp_path / "a.tar")
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_value_that_many_rows_refer_to_is_not_multiplied_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    large = {"image": b"x" * 2**20, "label": "y" * 2**20}[column]
    rows = {"image": [png(8, 8)] * 200, "label": ["a"] * 200} | {column: [large] * 200}
    pyarrow.parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2**21
    monkeypatch.setattr(data.sources.parquet, "MAX_GROUP_BYTES", 2**26)
    with pytest.raises(ValueError, match=f"column {column}: over the limit of 67,108,864 bytes"):
        opened(tmp_path / "a.parquet")._container.read(0)


def test_a_picture_of_16_bits_takes_little_more_memory_than_its_pixels() -> None:
    payload = png(4000, 3000)
    tracemalloc.start()
    pixels = decode_image(payload, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 4000 * 3000
    assert (pixels == round(40_000 / 257)).all()


def test_a_jpeg_that_repeats_its_scans_is_refused() -> None:
    payload = jpeg()
    assert decode_image(payload, 8).shape == (8, 8, 3)
    start = payload.index(b"\xff\xda")
    end = payload.index(b"\xff\xda", start + 2)
    repeated = payload[:end] + payload[start:end] * MAX_SCANS + payload[end:]
    with pytest.raises(ValueError, match="scans, over the limit"):
        decode_image(repeated, 8)
