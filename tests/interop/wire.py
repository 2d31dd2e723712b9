"""Hopline's frames, version 1, written from docs/wire.md and nothing else."""

import io
import struct
import uuid
from dataclasses import dataclass, field

import cbor2
import lz4.block
import zstandard

CONTENT_TYPE = "application/vnd.hopline"
HEADER = struct.Struct(">2sBBBBBB16sII")
MAX_FRAMES = 1024
MAX_METADATA = 64 * 1024
MAX_NAME = 255
MAX_USER_ENTRIES = 128
# The most that a payload may decompress to, and the least that is compressed.
MAX_PAYLOAD, MIN_COMPRESSED = 16 * 1024 * 1024, 1024

# Serializations.
RAW, CBOR, JSON, MESSAGE_PACK = range(4)
# Types of message.
REQUEST, REPLY, ONEWAY, EVENT, STREAM_ITEM, STREAM_END, CANCEL, CREDIT, KEEP_ALIVE, LOCATE = range(1, 11)
# Flags.
ZSTD, LZ4 = 1, 2
COMPRESSION = 0b0011
IDEMPOTENT, SERVICE_ERROR = 0b0100, 0b1000
# Metadata keys.
METHOD, REMAINING_MS, SENT_AT_MS, TRACEPARENT, INSTANCE, SEQUENCE = range(1, 7)
HANDLER_TIME_US, ATTEMPT, RETRY_AFTER_MS, USER, ERROR, TOO_LARGE, ACCEPTS, CALL_ID, RUNNING, PERMANENT = range(7, 17)
EVENT_VERSION = 17
READABLE = 0b11
TEXTS = {METHOD, TRACEPARENT, INSTANCE, ERROR}

STATUS = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]


class Malformed(Exception):
    """A body that is refused: in what field, at which byte, and with which status."""

    def __init__(self, status, what, offset, problem, id=None):
        super().__init__(f"frame field `{what}` at byte {offset}: {problem}")
        self.status, self.id = status, id


class Unreadable(Exception):
    """A payload that is not decompressed, and with which status it is refused."""

    def __init__(self, status, problem):
        super().__init__(problem)
        self.status = status


@dataclass
class Frame:
    type: int
    serialization: int = CBOR
    status: str = "OK"
    flags: int = 0
    id: uuid.UUID = field(default_factory=uuid.uuid4)
    metadata: dict = field(default_factory=dict)
    payload: bytes = b""

    @property
    def call_id(self):
        """The id of the call that this is an attempt of."""
        named = self.metadata.get(CALL_ID)
        return uuid.UUID(bytes=named) if named else self.id

    def encode(self):
        metadata = cbor2.dumps(self.metadata)
        header = HEADER.pack(
            b"HL",
            1,
            self.serialization,
            self.type,
            STATUS.index(self.status),
            self.flags,
            0,
            self.id.bytes,
            len(metadata),
            len(self.payload),
        )
        return header + metadata + self.payload

    def compress(self, compression):
        """Compresses the payload, if that is worth it."""
        small = compressed(compression, self.payload)
        if len(self.payload) >= MIN_COMPRESSED and len(small) < len(self.payload):
            self.flags, self.payload = self.flags | compression, small

    def plain(self, cap=MAX_PAYLOAD):
        """The payload as it was before it was compressed, if it was."""
        compression = self.flags & COMPRESSION
        return decompressed(compression, self.payload, cap) if compression else self.payload


def compressed(compression, payload):
    return lz4.block.compress(payload) if compression == LZ4 else zstandard.compress(payload)


def decompressed(compression, payload, cap):
    def over(size):
        return Unreadable("RESOURCE_EXHAUSTED", f"{size} bytes or more, over the cap of {cap}")

    try:
        if compression == LZ4:
            size = int.from_bytes(payload[:4], "little")
            if len(payload) >= 4 and size > cap:
                raise over(size)
            if len(payload) < 4 or size > 255 * (len(payload) - 4):
                raise ValueError(f"{len(payload)} bytes cannot stand for {size}")
            plain = lz4.block.decompress(payload)
            if len(plain) != size:
                raise ValueError(f"{len(plain)} bytes, and not {size}")
            return plain
        size = zstandard.frame_content_size(payload)
        if size > cap:
            raise over(size)
        decompressor = zstandard.ZstdDecompressor(max_window_size=max(2**21, cap)).decompressobj()
        plain = decompressor.decompress(payload) if size >= 0 else bounded(payload, cap)
        if size >= 0 and (not decompressor.eof or decompressor.unused_data):
            raise ValueError("not one whole frame")
        if len(plain) > cap:
            raise over(len(plain))
        return plain
    except (ValueError, zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise Unreadable("INVALID_ARGUMENT", str(error)) from error


def bounded(payload, cap):
    """No more than one byte over the cap, of a frame of zstd that does not name its size."""
    with zstandard.ZstdDecompressor(max_window_size=max(2**21, cap)).stream_reader(payload) as reader:
        return reader.read(cap + 1)


def decode(body):
    """The frames of a body, in order; raises Malformed where it cannot be read on."""
    offset, count = 0, 0
    while offset < len(body) or count == 0:
        frame, offset = decode_one(body, offset, count)
        count += 1
        yield frame


def decode_one(body, start, count):
    id = uuid.UUID(bytes=body[start + 8 : start + 24]) if len(body) >= start + 24 else None

    def refuse(status, what, at, problem):
        return Malformed(status, what, start + at, problem, None if what == "magic" else id)

    if count == MAX_FRAMES:
        raise refuse("INVALID_ARGUMENT", "magic", 0, f"more than {MAX_FRAMES} frames")
    if body[start : start + 2] not in (b"HL", b"H", b""):
        raise refuse("INVALID_ARGUMENT", "magic", 0, "not 484c")
    if len(body) < start + HEADER.size:
        raise refuse("INVALID_ARGUMENT", "header", 0, "truncated")
    _, version, serialization, type, status, flags, reserved, _, metadata_length, payload_length = HEADER.unpack_from(
        body, start
    )
    for what, at, known in [
        ("protocol version", 2, version == 1),
        ("serialization", 3, serialization <= 3),
        ("message type", 4, 1 <= type <= 10),
        ("status", 5, status <= 16),
        ("flags", 6, flags & ~(COMPRESSION | IDEMPOTENT | SERVICE_ERROR) == 0 and flags & COMPRESSION != COMPRESSION),
        ("reserved", 7, reserved == 0),
    ]:
        if not known:
            raise refuse("UNIMPLEMENTED", what, at, f"{body[start + at]} is not known here")
    metadata_at = start + HEADER.size
    payload_at = metadata_at + metadata_length
    end = payload_at + payload_length
    if metadata_length > MAX_METADATA or payload_at > len(body):
        raise refuse("INVALID_ARGUMENT", "metadata length", 24, str(metadata_length))
    if end > len(body):
        raise refuse("INVALID_ARGUMENT", "payload length", 28, str(payload_length))
    stream = io.BytesIO(body[metadata_at:payload_at])
    try:
        metadata = cbor2.load(stream)
    except Exception as error:
        raise refuse("INVALID_ARGUMENT", "metadata", 32, str(error)) from error
    if not isinstance(metadata, dict) or stream.tell() < metadata_length:
        raise refuse("INVALID_ARGUMENT", "metadata", 32, "not a map, and nothing but a map")
    for key, value in metadata.items():
        if not well_typed(key, value):
            raise refuse("INVALID_ARGUMENT", f"metadata {key}", 32, f"{value!r}")
    frame = Frame(type, serialization, STATUS[status], flags, id, metadata, body[payload_at:end])
    return frame, end


def well_typed(key, value):
    def number(value):
        return type(value) is int and 0 <= value < 2**64

    if not number(key):
        return False
    if key in TEXTS:
        return isinstance(value, str) and (key not in (METHOD, INSTANCE) or len(value.encode()) <= MAX_NAME)
    if key == USER:
        texts = isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)
        return texts and len(value) <= MAX_USER_ENTRIES
    if key == TOO_LARGE:
        return isinstance(value, list) and len(value) == 2 and all(map(number, value))
    if key == CALL_ID:
        return isinstance(value, bytes) and len(value) == 16
    return number(value) or key > EVENT_VERSION or key == 0
