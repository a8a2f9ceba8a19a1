"""TensorBoard event files, read back by a decoder written from the format's description."""

import os
import re
import struct
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="session")
def event_tool():
    path = Path(os.environ.get("REMNANT_BUILD", ROOT / "build")) / "tests" / "event_tool"
    if not path.is_file():
        pytest.skip(f"no program at {path}: run ./dev build")
    return path


def crc32c(data):
    """Bit by bit, from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(content):
    position = 0
    while position < len(content):
        length, length_crc = struct.unpack_from("<QI", content, position)
        assert length_crc == masked(content[position:position + 8])
        data = content[position + 12:position + 12 + length]
        assert len(data) == length
        assert struct.unpack_from("<I", content, position + 12 + length) == (masked(data),)
        yield data
        position += length + 16


def read_varint(data, position):
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def fields(message):
    """A protobuf message as (field, wire type) -> value; no field here is repeated."""
    found, position = {}, 0
    while position < len(message):
        key, position = read_varint(message, position)
        wire = key & 7
        if wire == 0:
            value, position = read_varint(message, position)
        else:
            if wire == 2:
                size, position = read_varint(message, position)
            else:
                size = {1: 8, 5: 4}[wire]
            assert position + size <= len(message)
            value, position = message[position:position + size], position + size
        assert (key >> 3, wire) not in found
        found[key >> 3, wire] = value
    return found


def write(event_tool, directory, scalars):
    text = "".join(f"{step}\t{value!r}\t{tag}\n" for step, value, tag in scalars)
    subprocess.run([event_tool, directory], input=text.encode(), check=True, timeout=60)
    (file,) = directory.iterdir()
    return file


def scalars_of(file):
    events = [fields(data) for data in records(file.read_bytes())]
    assert set(events[0]) == {(1, 1), (3, 2)}
    assert events[0][3, 2] == b"brain.Event:2"
    scalars = []
    for event in events[1:]:
        assert set(event) == {(1, 1), (2, 0), (5, 2)}
        summary = fields(event[5, 2])
        assert set(summary) == {(1, 2)}
        value = fields(summary[1, 2])
        assert set(value) == {(1, 2), (2, 5)}
        step = event[2, 0] - (event[2, 0] >> 63 << 64)
        scalars.append((step, value[2, 5], value[1, 2].decode()))
    return scalars


def as_float(value):
    return struct.pack("<f", value)


def test_the_decoder_knows_the_published_check_value():
    assert crc32c(b"123456789") == 0xE3069283


def test_name_and_time(event_tool, tmp_path):
    before = time.time()
    file = write(event_tool, tmp_path, [(1, 0.5, "loss")])
    after = time.time()
    name = re.fullmatch(r"events\.out\.tfevents\.(\d{10})\..+\.\d+", file.name)
    assert name and int(before) <= int(name[1]) <= after
    times = [struct.unpack("<d", fields(data)[1, 1])[0] for data in records(file.read_bytes())]
    assert len(times) == 2
    assert before - 0.01 <= times[0] <= times[1] <= after + 0.01


def test_long_tags_and_values_that_are_no_numbers(event_tool, tmp_path):
    scalars = [(0, float("nan"), "x"), (2**40, float("inf"), "train/Verlust über alles"),
               (-1, -float("inf"), "t" * 300), (7, -0.0, "")]
    read = scalars_of(write(event_tool, tmp_path, scalars))
    assert [(step, tag) for step, _, tag in read] == [(step, tag) for step, _, tag in scalars]
    nan = struct.unpack("<f", read[0][1])[0]
    assert nan != nan
    assert [value for _, value, _ in read[1:]] == [as_float(value) for _, value, _ in scalars[1:]]


tags = st.text(st.characters(codec="utf-8", exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(-2**63, 2**63 - 1), st.floats(width=32, allow_nan=False), tags),
                max_size=20))
def test_scalars_come_back(event_tool, tmp_path_factory, scalars):
    read = scalars_of(write(event_tool, tmp_path_factory.mktemp("events"), scalars))
    assert read == [(step, as_float(value), tag) for step, value, tag in scalars]


def test_more_than_one_buffer(event_tool, tmp_path):
    scalars = [(step, step / 8, "loss") for step in range(5000)]
    file = write(event_tool, tmp_path, scalars)
    assert file.stat().st_size > 3 * 65536
    assert scalars_of(file) == [(step, as_float(value), tag) for step, value, tag in scalars]


def test_a_second_writer_in_one_folder_takes_another_file(event_tool, tmp_path):
    for tag in "ab":
        subprocess.run([event_tool, tmp_path], input=f"1\t2.0\t{tag}\n".encode(), check=True, timeout=60)
    assert sorted(scalars_of(file)[0][2] for file in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_that_cannot_be_made_is_one_sentence(event_tool, tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([event_tool, tmp_path / "file"], input=b"", capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.decode() == f"cannot make the folder {tmp_path / 'file'}: Not a directory\n"
