"""Hopline's frames, version 1, written from docs/wire.md and nothing else."""

import io
import struct
import uuid
from dataclasses import dataclass, field

import cbor2

CONTENT_TYPE = "application/vnd.hopline"
HEADER = struct.Struct(">2sBBBBBB16sII")
MAX_FRAMES = 1024
MAX_METADATA = 64 * 1024

# Serializations.
RAW, CBOR, JSON, MESSAGE_PACK = range(4)
# Types of message.
REQUEST, REPLY, ONEWAY, EVENT, STREAM_ITEM, STREAM_END, CANCEL, CREDIT, KEEP_ALIVE = range(1, 10)
# Flags.
IDEMPOTENT, SERVICE_ERROR = 0b0100, 0b1000
# Metadata keys.
METHOD, REMAINING_MS, SENT_AT_MS, TRACEPARENT, INSTANCE, SEQUENCE = range(1, 7)
HANDLER_TIME_US, ATTEMPT, RETRY_AFTER_MS, USER, ERROR, TOO_LARGE = range(7, 13)
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


@dataclass
class Frame:
    type: int
    serialization: int = CBOR
    status: str = "OK"
    flags: int = 0
    id: uuid.UUID = field(default_factory=uuid.uuid4)
    metadata: dict = field(default_factory=dict)
    payload: bytes = b""

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
        ("message type", 4, 1 <= type <= 9),
        ("status", 5, status <= 16),
        ("flags", 6, flags & ~(IDEMPOTENT | SERVICE_ERROR) == 0),
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
        return isinstance(value, str)
    if key == USER:
        return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)
    if key == TOO_LARGE:
        return isinstance(value, list) and len(value) == 2 and all(map(number, value))
    return number(value) or key > TOO_LARGE or key == 0
