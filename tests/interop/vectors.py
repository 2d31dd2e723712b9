"""Writes the test vectors of docs/wire.md; with a file as argument, checks that the file has them, each to the letter.

The bytes come from wire.py and, where they are to be wrong, from hand. Hopline's own unit tests read them from there.
"""

import json
import pathlib
import re
import sys
import uuid

import cbor2

import wire
from wire import CBOR, JSON, MESSAGE_PACK, RAW, Frame

ID = uuid.UUID("00112233-4455-4677-8899-aabbccddeeff")
OTHER = uuid.UUID("0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff")
INSTANCE = "a1b2c3d4e5f6"
TYPES = ["request", "reply", "oneway", "event", "stream item", "stream end", "cancel", "credit", "keep-alive", "locate"]
SERIALIZATIONS = ["raw bytes", "CBOR", "JSON", "MessagePack"]
COMPRESSIONS = {wire.ZSTD: "zstd", wire.LZ4: "lz4"}
FLAGS = {wire.IDEMPOTENT: "idempotent", wire.SERVICE_ERROR: "service error"}


def chunks(data, size=32):
    return [data[at : at + size].hex(" ") for at in range(0, len(data), size)]


def described(frame, encoded, value=None, refusal=None):
    metadata_end = 32 + int.from_bytes(encoded[24:28])
    lines = [("hex", part) for part in (encoded[:8].hex(" "), encoded[8:24].hex(" "), encoded[24:32].hex(" "))]
    lines += [("hex", part) for part in chunks(encoded[32:metadata_end]) + chunks(encoded[metadata_end:])]
    lines.append(("type", TYPES[frame.type - 1]))
    lines.append(("serialization", SERIALIZATIONS[frame.serialization]))
    lines.append(("status", frame.status))
    lines += [("flag", name) for bit, name in FLAGS.items() if frame.flags & bit]
    lines.append(("id", frame.id))
    for key, content in frame.metadata.items():
        if key == wire.USER:
            lines += [("metadata 10", f"{name}={text}") for name, text in content.items()]
        elif key == wire.TOO_LARGE:
            lines.append(("metadata 12", f"{content[0]} of {content[1]}"))
        elif key == wire.CALL_ID:
            lines.append(("metadata 14", uuid.UUID(bytes=content)))
        elif key <= wire.ACCEPTS or key in (wire.RUNNING, wire.PERMANENT, wire.EVENT_VERSION):
            lines.append((f"metadata {key}", content))
    if frame.flags & wire.COMPRESSION:
        lines.append(("compression", COMPRESSIONS[frame.flags & wire.COMPRESSION]))
    lines.append(("payload", frame.payload.hex(" ") or "empty"))
    if value is not None:
        lines.append(("value", json.dumps(value)))
    if refusal is not None:
        lines.append(("refusal", refusal))
    return lines


def block(name, about, info, lines):
    text = "\n".join(f"{key:<14} {value}" for key, value in lines)
    return f"#### {name}\n\n{about}\n\n```{info}\n{text}\n```\n"


def vector(name, about, *frames):
    lines = []
    for frame, *value in frames:
        lines += described(frame, frame.encode(), *value)
    return block(name, about, "vector", lines)


def other_form(name, about, frame, metadata, value):
    """The same frame, but its metadata in another form of CBOR than Hopline writes."""
    encoded = bytearray(Frame(frame.type, frame.serialization, id=frame.id, payload=frame.payload).encode())
    encoded[24:28] = len(metadata).to_bytes(4)
    encoded[32:33] = metadata
    return block(name, about, "vector", [("form", "other"), *described(frame, bytes(encoded), value)])


def refused(name, about, body, field, offset, status="INVALID_ARGUMENT", frames=0):
    lines = [("hex", part) for part in chunks(body)]
    lines += [("frames before", frames), ("field", field), ("offset", offset), ("status", status)]
    return block(name, about, "refused", lines)


def request(method="add", arguments=b"\x82\x02\x03", **more):
    return Frame(wire.REQUEST, id=ID, metadata={wire.METHOD: method}, payload=arguments, **more)


def with_bytes(body, at, *values):
    return body[:at] + bytes(values) + body[at + len(values) :]


def with_metadata(metadata):
    """A request without payload, with these bytes as its metadata."""
    empty = Frame(wire.REQUEST, id=ID).encode()
    return empty[:24] + len(metadata).to_bytes(4) + empty[28:32] + metadata


def accepted():
    minimal = request()
    yield vector(
        "minimal request",
        "`add(2, 3)` in CBOR. The shortest request there is: it has no deadline, and its sender no name.",
        (minimal, [2, 3]),
    )
    second = {wire.METHOD: "add", wire.ATTEMPT: 2, wire.CALL_ID: ID.bytes}
    yield vector(
        "request of a second attempt",
        "The same call again, as its caller sends it when the first request has failed: with an id of its own.",
        (Frame(wire.REQUEST, id=OTHER, metadata=second, payload=b"\x82\x02\x03"), [2, 3]),
    )
    full = Frame(
        wire.REQUEST,
        flags=wire.IDEMPOTENT,
        id=ID,
        metadata={
            wire.METHOD: "fib",
            wire.REMAINING_MS: 30000,
            wire.SENT_AT_MS: 1767225600123,
            wire.TRACEPARENT: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            wire.INSTANCE: INSTANCE,
            wire.SEQUENCE: 0,
            wire.HANDLER_TIME_US: 24,
            wire.ATTEMPT: 2,
            wire.RETRY_AFTER_MS: 4294967296,
            wire.USER: {"tenant": "acme", "naïve": "", "": "empty name"},
            wire.ERROR: "für niemanden",
            wire.TOO_LARGE: [16777217, 16777216],
            wire.ACCEPTS: 0b10,
            wire.CALL_ID: OTHER.bytes,
        },
        payload=b"\x81\x0a",
    )
    yield vector(
        "request with every metadata key",
        "`fib(10)`, idempotent. Keys that make no sense on a request are there too, to show their form.",
        (full, [10]),
    )
    yield vector(
        "request without arguments",
        "`whoami()` in CBOR: no arguments are an empty array.",
        (request("whoami", b"\x80"), []),
    )
    yield vector(
        "JSON request",
        "`fib(10)` in JSON. Metadata is CBOR all the same.",
        (request("fib", b"[10]", serialization=JSON), [10]),
    )
    yield vector(
        "MessagePack request",
        "`add(2, 3)` in MessagePack.",
        (request("add", b"\x92\x02\x03", serialization=MESSAGE_PACK), [2, 3]),
    )
    yield vector(
        "raw request",
        "`echo(bytes)` with the one argument's four bytes as they are: no array around them.",
        (request("echo", b"\x00\xff\xfe\x01", serialization=RAW),),
    )
    ran = {wire.INSTANCE: INSTANCE, wire.HANDLER_TIME_US: 1500}
    yield vector(
        "reply",
        "The result 89 in CBOR, after 1.5 ms.",
        (Frame(wire.REPLY, id=ID, metadata=ran, payload=b"\x18\x59"), 89),
    )
    yield vector(
        "reply of a chosen instance",
        "Its caller has chosen the instance, where three calls run.",
        (Frame(wire.REPLY, id=ID, metadata=ran | {wire.RUNNING: 3}, payload=b"\x18\x59"), 89),
    )
    exp = b'{"value":8,"cost_nanos":17}'
    yield vector(
        "JSON reply",
        "A record is a map from the names of its fields.",
        (Frame(wire.REPLY, JSON, id=ID, metadata=ran, payload=exp), {"value": 8, "cost_nanos": 17}),
    )
    raw = Frame(wire.REPLY, RAW, id=ID, metadata=ran, payload=b"\x00\xff\xfe\x01")
    yield vector("raw reply", "A result of bytes.", (raw,))
    division = cbor2.dumps("DivisionByZero")
    failed = Frame(wire.REPLY, CBOR, "UNKNOWN", wire.SERVICE_ERROR, ID, ran, division)
    yield vector(
        "typed error",
        "The method returned its own error: here an enum's variant without fields.",
        (failed, "DivisionByZero"),
    )
    limited = {wire.INSTANCE: INSTANCE, wire.RETRY_AFTER_MS: 250, wire.ERROR: "100 calls a second, no more"}
    fault = Frame(wire.REPLY, CBOR, "RESOURCE_EXHAUSTED", 0, ID, limited)
    yield vector("fault", "A refusal with its reason, and when to try again.", (fault,))
    gone = ran | {wire.ERROR: "the queue was closed for good", wire.PERMANENT: 1}
    fault = Frame(wire.REPLY, CBOR, "UNAVAILABLE", 0, ID, gone)
    yield vector("permanent fault", "Trying again does not help.", (fault,))
    large = {wire.INSTANCE: INSTANCE, wire.ERROR: "the reply takes 20000000 bytes, over the cap of 16777216"}
    large = Frame(wire.REPLY, CBOR, "RESOURCE_EXHAUSTED", 0, ID, large | {wire.TOO_LARGE: [20000000, 16777216]})
    yield vector("reply too large", "The fault in the place of a reply over the cap.", (large,))
    note = Frame(
        wire.ONEWAY, id=ID, metadata={wire.METHOD: "note", wire.INSTANCE: INSTANCE}, payload=cbor2.dumps(["hello"])
    )
    yield vector("oneway", '`note("hello")`, which nobody answers.', (note, ["hello"]))
    event = Frame(
        wire.EVENT,
        id=ID,
        metadata={wire.METHOD: "order.created", wire.INSTANCE: INSTANCE},
        payload=cbor2.dumps({"number": 7}),
    )
    yield vector("event", "The payload is the event itself, with no array around it.", (event, {"number": 7}))
    event.metadata[wire.EVENT_VERSION] = 2
    yield vector(
        "event of a version",
        "The same event, as a type says it that is of version 2. Without key 17 it is of version 1.",
        (event, {"number": 7}),
    )
    cancel = Frame(wire.CANCEL, RAW, id=ID, metadata={wire.REMAINING_MS: 12000, wire.INSTANCE: INSTANCE})
    yield vector("cancel", "Nobody waits for the request of this id any more; it would have had 12 s left.", (cancel,))
    second = Frame(wire.REQUEST, id=OTHER, metadata={wire.METHOD: "add"}, payload=b"\x82\x04\x05")
    yield vector(
        "two frames in one body", "`add(2, 3)` and `add(4, 5)`, back to back.", (minimal, [2, 3]), (second, [4, 5])
    )
    yield from with_compression()
    unknown = {0: None, 18: {"new": [1, {"in": 2.5}]}, 2**64 - 1: b"\x00"}
    yield other_form(
        "unknown metadata keys",
        "Keys 0, 18 and 2^64-1 mean nothing in version 1: whatever they hold is skipped.",
        minimal,
        cbor2.dumps(unknown | minimal.metadata),
        [2, 3],
    )
    yield other_form(
        "metadata in other forms",
        "A map of indefinite length, keys in another order and in more bytes than they need.",
        Frame(
            wire.REQUEST,
            id=ID,
            metadata={wire.METHOD: "add", wire.REMAINING_MS: 3000, wire.USER: {"a": "b"}},
            payload=b"\x82\x02\x03",
        ),
        bytes.fromhex("bf 180a bf 6161 7801 62 ff 19 0002 1b 0000000000000bb8 01 63 616464 ff"),
        [2, 3],
    )


def with_compression():
    """Payloads that are compressed; the last four are not decompressed."""
    text = ["hop" * 32]
    plain = cbor2.dumps(text)
    lz4, zstd = (wire.compressed(compression, plain) for compression in (wire.LZ4, wire.ZSTD))
    yield vector(
        "lz4 request",
        "`echo` of a text, by a client that can read lz4. The first 4 bytes of the payload are the size, 99.",
        (
            Frame(
                wire.REQUEST, flags=wire.LZ4, id=ID, metadata={wire.METHOD: "echo", wire.ACCEPTS: 0b10}, payload=lz4
            ),
            text,
        ),
    )
    yield vector(
        "zstd reply",
        "The same text as a result, from a server that can read both. Peers without zstd read the frame, not the payload.",
        (
            Frame(
                wire.REPLY,
                flags=wire.ZSTD,
                id=ID,
                metadata={wire.INSTANCE: INSTANCE, wire.HANDLER_TIME_US: 1500, wire.ACCEPTS: 0b11},
                payload=wire.compressed(wire.ZSTD, cbor2.dumps(text[0])),
            ),
            text[0],
        ),
    )
    invalid, exhausted = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"
    for name, about, flags, payload, refusal in [
        ("lz4 block cut off", "Half of the payload before the last one.", wire.LZ4, lz4[: len(lz4) // 2], invalid),
        ("lz4 block of another size", "100 bytes named, 99 there.", wire.LZ4, b"\x64" + lz4[1:], invalid),
        ("lz4 size out of reach", "16 MiB named: no block of 10 bytes stands for so many.", wire.LZ4,
         bytes.fromhex("00000001 1f000100ffffffffffff"), invalid),
        ("lz4 size over the cap", "16 MiB and a byte named. The cap is that of the receiver, by default 16 MiB.",
         wire.LZ4, bytes.fromhex("01000001 1f000100ffffffffffff"), exhausted),
        ("zstd frame cut off", "Half of one.", wire.ZSTD, zstd[: len(zstd) // 2], invalid),
        ("zstd size over the cap", "A header of zstd that names 16 MiB and a byte.", wire.ZSTD,
         bytes.fromhex("28b52ffd a0 01000001 030000"), exhausted),
    ]:
        frame = request("echo", payload, flags=flags)
        yield block(name, about, "vector", described(frame, frame.encode(), refusal=refusal))


def rejected():
    good = request().encode()
    unknown = "UNIMPLEMENTED"
    yield refused("empty body", "A body has at least one frame.", b"", "header", 0)
    yield refused("wrong magic", "`HTTP` begins with H too.", b"HTTP/1.1 200 OK", "magic", 0)
    yield refused("truncated header", "31 bytes of 32.", good[:31], "header", 0)
    yield refused("version 2", "The version after this one.", with_bytes(good, 2, 2), "protocol version", 2, unknown)
    yield refused("version 0", "There is no such version.", with_bytes(good, 2, 0), "protocol version", 2, unknown)
    yield refused("unknown serialization", "4.", with_bytes(good, 3, 4), "serialization", 3, unknown)
    yield refused("type 0", "0.", with_bytes(good, 4, 0), "message type", 4, unknown)
    yield refused("type 11", "11.", with_bytes(good, 4, 11), "message type", 4, unknown)
    yield refused("unknown status", "17.", with_bytes(good, 5, 17), "status", 5, unknown)
    yield refused("compression 3", "There is no such compression.", with_bytes(good, 6, 3), "flags", 6, unknown)
    yield refused(
        "undefined flag", "Bit 4; so with bits 5, 6 and 7.", with_bytes(good, 6, 0b10000), "flags", 6, unknown
    )
    yield refused("reserved byte", "1, which has to be 0.", with_bytes(good, 7, 1), "reserved", 7, unknown)
    yield refused(
        "metadata beyond the body",
        "11 bytes claimed, 9 left.",
        with_bytes(good, 24, 0, 0, 0, 11),
        "metadata length",
        24,
    )
    yield refused(
        "metadata over its cap", "65 537 bytes claimed.", with_bytes(good, 24, 0, 1, 0, 1), "metadata length", 24
    )
    yield refused(
        "metadata of 4 GiB",
        "4 294 967 295 bytes claimed.",
        with_bytes(good, 24, 255, 255, 255, 255),
        "metadata length",
        24,
    )
    yield refused(
        "payload beyond the body", "4 bytes claimed, 3 there.", with_bytes(good, 28, 0, 0, 0, 4), "payload length", 28
    )
    yield refused(
        "payload of 4 GiB",
        "4 294 967 295 bytes claimed. Nothing may be allocated for a claim.",
        with_bytes(good, 28, 255, 255, 255, 255),
        "payload length",
        28,
    )
    yield refused(
        "no metadata",
        "Metadata of no bytes is no map; the empty map is the byte `a0`.",
        with_metadata(b""),
        "metadata",
        32,
    )
    yield refused("metadata that is no map", "An array.", with_metadata(b"\x81\x01"), "metadata", 32)
    yield refused(
        "text as a metadata key", '`{"1": 1}`.', with_metadata(bytes.fromhex("a1 6131 01")), "metadata key", 33
    )
    yield refused(
        "method that is a number", "`{1: 5}`.", with_metadata(bytes.fromhex("a1 01 05")), "metadata 1 (method)", 34
    )
    yield refused(
        "method that is not UTF-8",
        "The bytes c3 28.",
        with_metadata(bytes.fromhex("a1 01 62 c328")),
        "metadata 1 (method)",
        34,
    )
    yield refused(
        "method in pieces",
        "Text of indefinite length.",
        with_metadata(bytes.fromhex("a1 01 7f 6161 6162 ff")),
        "metadata 1 (method)",
        34,
    )
    yield refused(
        "method over its cap",
        "256 bytes.",
        with_metadata(cbor2.dumps({wire.METHOD: "m" * 256})),
        "metadata 1 (method)",
        293,
    )
    yield refused(
        "instance over its cap",
        "256 bytes.",
        with_metadata(cbor2.dumps({wire.INSTANCE: "i" * 256})),
        "metadata 5 (instance)",
        293,
    )
    yield refused(
        "negative time", "-1 ms.", with_metadata(bytes.fromhex("a1 02 20")), "metadata 2 (remaining time)", 34
    )
    yield refused(
        "fraction of a time", "1.5.", with_metadata(bytes.fromhex("a1 02 f9 3e00")), "metadata 2 (remaining time)", 34
    )
    yield refused(
        "number in the user's map",
        '`{"a": 1}`.',
        with_metadata(bytes.fromhex("a1 0a a1 6161 01")),
        "metadata 10 (user's map)",
        37,
    )
    many = cbor2.dumps({wire.USER: {f"{n:02x}": "" for n in range(129)}})
    yield refused(
        "a user's map of 129 entries",
        "One too many.",
        with_metadata(many),
        "metadata 10 (user's map)",
        32 + len(many),
    )
    yield refused(
        "one size of two",
        "An array of one.",
        with_metadata(bytes.fromhex("a1 0c 81 01")),
        "metadata 12 (size and cap)",
        34,
    )
    yield refused(
        "compressions as text",
        "`{13: \"lz4\"}`.",
        with_metadata(cbor2.dumps({wire.ACCEPTS: "lz4"})),
        "metadata 13 (readable compressions)",
        34,
    )
    yield refused(
        "call's id as text",
        "Its 36 letters.",
        with_metadata(cbor2.dumps({wire.CALL_ID: str(OTHER)})),
        "metadata 14 (call)",
        34,
    )
    yield refused(
        "call's id of 15 bytes",
        "One too few.",
        with_metadata(cbor2.dumps({wire.CALL_ID: OTHER.bytes[:15]})),
        "metadata 14 (call)",
        50,
    )
    yield refused(
        "metadata that ends early",
        "A map of two entries with one.",
        with_metadata(bytes.fromhex("a2 01 63 616464")),
        "metadata key",
        38,
    )
    yield refused(
        "map without its end",
        "Of indefinite length, without the break.",
        with_metadata(bytes.fromhex("bf 01 63 616464")),
        "metadata",
        38,
    )
    yield refused(
        "trailing bytes in metadata",
        "A whole map, and one more byte.",
        with_metadata(bytes.fromhex("a1 01 63 616464 00")),
        "metadata",
        38,
    )
    yield refused(
        "a user's map of 2^60 entries",
        "Nothing may be allocated for a claim.",
        with_metadata(bytes.fromhex("a1 0a bb 1000000000000000")),
        "metadata 10 (user's map)",
        43,
    )
    yield refused(
        "text of 2^60 bytes",
        "Likewise.",
        with_metadata(bytes.fromhex("a1 0b 7b 1000000000000000")),
        "metadata 11 (error text)",
        43,
    )
    yield refused(
        "second frame broken",
        "The first one is whole, and stands.",
        good + with_bytes(good, 2, 9),
        "protocol version",
        len(good) + 2,
        unknown,
        1,
    )
    yield refused("second frame cut off", "10 bytes of its header.", good + good[:10], "header", len(good), frames=1)


def main():
    parts = ["### Frames to read and write\n", *accepted(), "### Frames to refuse\n", *rejected()]
    if len(sys.argv) == 1:
        print("\n".join(parts), end="")
        return
    document = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
    missing = [part.splitlines()[0] for part in parts if part not in document]
    extra = document.count("\n#### ") - sum(part.startswith("#### ") for part in parts)
    if missing or extra:
        sys.exit(f"{sys.argv[1]} differs: {missing or f'{extra} sections more'}")
    for name, sort, lines in re.findall(r"#### (.*)\n\n.*\n\n```(.*)\n((?:.{14} .*\n)*)```", document):
        read_back(name, sort == "refused", [(line[:14].rstrip(), line[15:]) for line in lines.splitlines()])
    print(f"{len(parts) - 2} vectors are in {sys.argv[1]}, and are read as they say")


def read_back(name, refused, lines):
    body = bytes.fromhex("".join(value for key, value in lines if key == "hex"))
    try:
        frames = list(wire.decode(body))
    except wire.Malformed as error:
        assert refused and error.status == dict(lines)["status"], f"{name}: {error}"
    else:
        # cbor2 joins text in pieces, and does not tell.
        assert not refused or name == "method in pieces", f"{name} was read"
        for frame, refusal in zip(frames, [value for key, value in lines if key == "refusal"]):
            try:
                frame.plain()
                raise AssertionError(f"the payload of {name} was read")
            except wire.Unreadable as error:
                assert error.status == refusal, f"{name}: {error.status}: {error}"
        for frame, value in zip(frames, [json.loads(value) for key, value in lines if key == "value"]):
            if frame.flags & wire.COMPRESSION:
                assert cbor2.loads(frame.plain()) == value, name
        assert refused or [str(frame.id) for frame in frames] == [value for key, value in lines if key == "id"], name


if __name__ == "__main__":
    main()
