"""A client of Hopline on pika, written from docs/wire.md and nothing else.

It does one thing at a time: a call that has begun waits in `replies` until somebody asks for it.
"""

import json
import secrets
import time
import uuid

import cbor2
import pika
from pika.exceptions import NackError, UnroutableError

import wire
from wire import CBOR, RAW, Frame

EXCHANGES = {"rpc": "direct", "oneway": "topic", "events": "topic", "discovery": "direct"}


class NoService(Exception):
    """No instance serves it: the broker returned the message."""


class Overloaded(Exception):
    """The service's queue is full: the broker refused the message."""


class Timeout(Exception):
    """The deadline passed."""


class ServiceError(Exception):
    """The method returned its own error, which is `args[0]`."""


class TooLarge(Exception):
    """The reply was over the limit: its size and the limit."""


class Fault(Exception):
    """The server refused the call or stopped it."""

    def __init__(self, status, message, retry_after_ms=None):
        super().__init__(f"{status}: {message}")
        self.status, self.message, self.retry_after_ms = status, message, retry_after_ms


def encode(serialization, value):
    """A payload. Raw bytes carry an argument or a result that is bytes, so `value` may be a list of it alone."""
    if serialization == RAW:
        return b"".join(value) if isinstance(value, list) else value
    return cbor2.dumps(value) if serialization == CBOR else json.dumps(value).encode()


def decode(serialization, payload):
    if serialization == RAW:
        return payload
    return cbor2.loads(payload) if serialization == CBOR else json.loads(payload)


def outcome(reply):
    """Returns the result in a reply, or raises its error."""
    if reply.flags & wire.SERVICE_ERROR:
        raise ServiceError(decode(reply.serialization, reply.plain()))
    if wire.TOO_LARGE in reply.metadata:
        raise TooLarge(*reply.metadata[wire.TOO_LARGE])
    if reply.status == "DEADLINE_EXCEEDED":
        raise Timeout
    if reply.status != "OK" or wire.ERROR in reply.metadata:
        status = "UNKNOWN" if reply.status == "OK" else reply.status
        raise Fault(status, reply.metadata.get(wire.ERROR), reply.metadata.get(wire.RETRY_AFTER_MS))
    return decode(reply.serialization, reply.plain())


class Client:
    def __init__(self, url, namespace="hopline"):
        self.namespace = namespace
        self.instance = secrets.token_hex(6)
        self.reply_queue = f"{namespace}.reply@{self.instance}.{secrets.token_hex(6)}"
        # Ids of calls that have begun, each with the replies to it so far.
        self.replies = {}

        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()
        for name, kind in EXCHANGES.items():
            self.channel.exchange_declare(f"{namespace}.{name}", kind, durable=True)
        self.channel.queue_declare(self.reply_queue, exclusive=True)
        self.channel.basic_consume(self.reply_queue, self.receive, auto_ack=True)
        self.channel.confirm_delivery()

    def close(self):
        self.connection.close()

    def call(self, service, method, *arguments, **options):
        """Calls a method of a service, such as `demo.v1`, and waits for its result."""
        id = self.start(service, method, *arguments, **options)
        try:
            return outcome(self.wait(id, options.get("timeout", 30)))
        except Timeout:
            self.cancel(id, service, options.get("instance"), 0)
            raise

    def start(self, service, method, *arguments, serialization=CBOR, timeout=30, instance=None, user=None, again=None):
        """Sends a request and returns its id. With `again`, it is another attempt of the call with that id."""
        frame = self.frame(wire.REQUEST, method, arguments, serialization, again)
        frame.metadata[wire.REMAINING_MS] = int(timeout * 1000)
        if user:
            frame.metadata[wire.USER] = user
        key = f"{service}@{instance}" if instance else service
        self.request(frame, f"{self.namespace}.rpc", key, f"{service}.{method}", timeout)
        return frame.id

    def wait(self, id, seconds):
        """Waits for the first reply to a request that was sent."""
        deadline = time.monotonic() + seconds
        while not self.replies[id]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Timeout
            self.connection.process_data_events(left)
        return self.replies.pop(id)[0]

    def cancel(self, id, service, instance=None, seconds_left=30):
        """Cancels a request."""
        self.replies.pop(id, None)
        metadata = {wire.INSTANCE: self.instance, wire.REMAINING_MS: int(seconds_left * 1000)}
        frame = Frame(wire.CANCEL, RAW, id=id, metadata=metadata)
        try:
            self.publish(f"{self.namespace}.rpc", f"{service}@{instance or '*'}", frame)
        except NoService:
            pass  # No instance is there that could run it.

    def is_served(self, service):
        """Whether an instance is there. A cancel without a call is returned if none is."""
        frame = Frame(wire.CANCEL, RAW, id=uuid.UUID(int=0), metadata={wire.INSTANCE: self.instance})
        try:
            self.publish(f"{self.namespace}.rpc", f"{service}@*", frame)
        except NoService:
            return False
        return True

    def oneway(self, service, method, *arguments, again=None):
        """Publishes a oneway call. Returns its id when the broker has confirmed it."""
        frame = self.frame(wire.ONEWAY, method, arguments, CBOR, again)
        self.publish(
            f"{self.namespace}.oneway", f"{service}.{method}", frame, type=f"{service}.{method}", delivery_mode=2
        )
        return frame.id

    def broadcast(self, service, method, *arguments, instances=1, window=10):
        """Calls every instance. Returns the replies by instance, when there are enough or the window is over."""
        frame = self.frame(wire.REQUEST, method, arguments, CBOR)
        return self.gather(frame, f"{self.namespace}.rpc", f"{service}@*", f"{service}.{method}", instances, window)

    def gather(self, frame, exchange, key, type, instances, window):
        frame.metadata[wire.REMAINING_MS] = int(window * 1000)
        self.request(frame, exchange, key, type, window)
        deadline = time.monotonic() + window
        while len(self.replies[frame.id]) < instances and time.monotonic() < deadline:
            self.connection.process_data_events(max(0, deadline - time.monotonic()))
        return {reply.metadata[wire.INSTANCE]: outcome(reply) for reply in self.replies.pop(frame.id)}

    def discover(self, question, instances=1, window=10):
        """Asks the instances of all services. Returns their replies, when there are enough or the window is over."""
        frame = self.frame(wire.REQUEST, question, [], CBOR)
        return self.gather(frame, f"{self.namespace}.discovery", "ask", f"hopline.v1.{question}", instances, window)

    def event(self, key, value):
        frame = self.frame(wire.EVENT, key, None, CBOR)
        frame.payload = encode(CBOR, value)
        self.publish(f"{self.namespace}.events", key, frame, mandatory=False, type=key, delivery_mode=2)

    def frame(self, type, method, arguments, serialization, again=None):
        metadata = {
            wire.METHOD: method,
            wire.SENT_AT_MS: time.time_ns() // 1_000_000,
            wire.TRACEPARENT: f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
            wire.INSTANCE: self.instance,
        }
        if type == wire.REQUEST:
            metadata[wire.ACCEPTS] = wire.READABLE
        if again:
            metadata |= {wire.ATTEMPT: 2, wire.CALL_ID: again.bytes}
        payload = b"" if arguments is None else encode(serialization, list(arguments))
        return Frame(type, serialization, metadata=metadata, payload=payload)

    def request(self, frame, exchange, key, type, timeout):
        self.replies[frame.id] = []
        try:
            self.publish(
                exchange, key, frame, type=type, reply_to=self.reply_queue, expiration=str(int(timeout * 1000))
            )
        except Exception as error:
            # The queue of one instance was deleted at this moment. The other instances have the broadcast.
            if not (isinstance(error, Overloaded) and key.endswith("@*")):
                del self.replies[frame.id]
                raise

    def publish(self, exchange, key, *frames, mandatory=True, **properties):
        """Publishes a message and waits for the broker's confirm."""
        properties = pika.BasicProperties(
            content_type=wire.CONTENT_TYPE,
            correlation_id=str(frames[0].id),
            app_id=self.instance,
            **properties,
        )
        self.publish_body(exchange, key, b"".join(frame.encode() for frame in frames), properties, mandatory)

    def publish_body(self, exchange, key, body, properties, mandatory=True):
        try:
            self.channel.basic_publish(exchange, key, body, properties, mandatory)
        except UnroutableError:
            raise NoService(key or exchange) from None
        except NackError:
            raise Overloaded(key or exchange) from None

    def receive(self, channel, delivery, properties, body):
        for frame in wire.decode(body):
            if frame.type == wire.REPLY and frame.id in self.replies:
                self.replies[frame.id].append(frame)
