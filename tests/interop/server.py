"""A server of Hopline on pika, written from docs/wire.md and nothing else. As a program, it serves `pyserv` version 1.

Handlers run on threads; everything else happens on the thread of `run`, since pika's connections belong to one thread.
"""

import collections
import functools
import inspect
import secrets
import signal
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pika
from pika.exceptions import NackError, UnroutableError

import wire
from client import EXCHANGES, Fault, ServiceError, decode, encode
from wire import CBOR, RAW, Frame, Malformed

PREFETCH = 64
MAX_SIZE = 16 * 1024 * 1024
MAX_REMEMBERED, MAX_MEMORY_S = 10_000, 3600
CALLS, WORK, INSTANCE = "calls", "oneway calls", "one instance"


class Message:
    """A delivery. It is acknowledged when all its frames are finished."""

    def __init__(self, source, channel, delivery, properties, body):
        self.source, self.channel, self.delivery = source, channel, delivery
        self.properties, self.body = properties, body
        self.received = time.monotonic()
        self.frames = self.open = 0

    def finish(self):
        self.open -= 1
        if self.open == 0:
            self.channel.basic_ack(self.delivery.delivery_tag)


class Call:
    """A frame that is being run. Its handler may look at `cancelled`."""

    def __init__(self, frame, message):
        self.frame, self.message = frame, message
        self.cancelled = threading.Event()
        remaining = frame.metadata.get(wire.REMAINING_MS)
        self.deadline = None if remaining is None else message.received + remaining / 1000


@dataclass
class Method:
    handler: object
    idempotent: bool = False
    # For how many seconds after its end a call gets the same answer again, without being run.
    once: float = 0


class Once:
    """A call that is to run once: by which attempt it runs or ran, who waits for its end, and how it ended until when."""

    def __init__(self, attempt):
        self.attempt, self.waiting = attempt, []
        self.ended, self.answer, self.until = False, None, None


class Server:
    """Serves `methods`, which maps names to methods."""

    # The queues that it shares with other instances, and what belongs on each of its queues.
    shares = {"work": WORK, "calls": CALLS}
    belongs = {CALLS: {wire.REQUEST}, WORK: {wire.ONEWAY}, INSTANCE: {wire.REQUEST, wire.ONEWAY}}

    def __init__(self, url, service, methods, namespace="hopline"):
        self.namespace, self.service, self.methods = namespace, service, methods
        self.instance = secrets.token_hex(6)
        self.arrived = collections.deque()
        self.ended = collections.deque()
        self.running = {}
        self.finished = 0
        self.once = {}
        self.cancelled = {}
        self.stopping = False
        self.threads = ThreadPoolExecutor(max_workers=PREFETCH)

        parameters = pika.URLParameters(url)
        self.user = parameters.credentials.username
        self.connection = pika.BlockingConnection(parameters)
        self.channel = self.connection.channel()
        own = self.own_queue = f"{namespace}.{service}@{self.instance}.{secrets.token_hex(6)}"
        self.declare(own)
        self.publisher = self.connection.channel()
        self.publisher.confirm_delivery()
        self.channel.basic_qos(prefetch_count=PREFETCH)
        self.own = self.connection.channel()
        self.own.basic_qos(prefetch_count=1024)
        self.own.basic_consume(own, functools.partial(self.deliver, INSTANCE))
        self.shared = [
            self.channel.basic_consume(f"{namespace}.{service}.{name}", functools.partial(self.deliver, source))
            for name, source in self.shares.items()
        ]

    def declare(self, own):
        channel, service = self.channel, self.service
        rpc, oneway = f"{self.namespace}.rpc", f"{self.namespace}.oneway"
        calls = f"{self.namespace}.{service}.calls"
        work = self.declare_kept(own)
        channel.queue_bind(own, rpc, f"{service}@?")
        channel.queue_bind(own, rpc, f"{service}@~")
        for method in self.methods:
            channel.queue_bind(work, oneway, f"{service}.{method}")
        channel.queue_declare(calls, durable=True, arguments={"x-queue-type": "classic", "x-expires": 60000})
        channel.queue_bind(calls, rpc, service)

    def declare_kept(self, own):
        """Declares what a service and a group have. Returns the name of the queue of work."""
        channel, service = self.channel, self.service
        for name, kind in EXCHANGES.items():
            channel.exchange_declare(f"{self.namespace}.{name}", kind, durable=True)
        dead_queue, work = (f"{self.namespace}.{service}.{name}" for name in ("dead", "work"))

        kept = {"x-queue-type": "quorum", "x-delivery-limit": 2000000000}
        channel.queue_declare(dead_queue, durable=True, arguments=kept)
        channel.queue_declare(own, exclusive=True)
        channel.queue_bind(own, f"{self.namespace}.rpc", f"{service}@{self.instance}")
        channel.queue_bind(own, f"{self.namespace}.rpc", f"{service}@*")
        channel.queue_bind(own, f"{self.namespace}.discovery", "ask")
        arguments = {
            "x-queue-type": "quorum",
            "x-delivery-limit": 19,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead_queue,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        channel.queue_declare(work, durable=True, arguments=arguments)
        return work

    def stop(self):
        """May be called from a signal handler or another thread."""
        self.stopping = True
        self.connection.add_callback_threadsafe(lambda: None)

    def run(self):
        """Serves until `stop`, then drains."""
        while not self.stopping:
            self.connection.process_data_events(self.until_next_deadline())
            self.turn()
        for consumer in self.shared:
            self.channel.basic_cancel(consumer)
        self.channel.queue_unbind(self.own_queue, f"{self.namespace}.rpc", f"{self.service}@?")
        while self.running or self.ended:
            self.connection.process_data_events(self.until_next_deadline())
            self.turn()
        self.connection.close()
        self.threads.shutdown(wait=False)

    def turn(self):
        while self.arrived:
            self.read(self.arrived.popleft())
        while self.ended:
            self.conclude(*self.ended.popleft())
        for call in [call for call in self.running.values() if call.deadline and call.deadline <= time.monotonic()]:
            del self.running[call.frame.id]
            call.cancelled.set()
            late = Fault("DEADLINE_EXCEEDED", "the deadline passed while it ran")
            self.end_once(call, late)
            self.answer(call.frame, call.message, late)

    def until_next_deadline(self):
        deadlines = [call.deadline for call in self.running.values() if call.deadline]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def deliver(self, source, channel, delivery, properties, body):
        self.arrived.append(Message(source, channel, delivery, properties, body))

    def read(self, message):
        frames, offset, broken = [], 0, None
        try:
            while offset < len(message.body) or not frames:
                frame, offset = wire.decode_one(message.body, offset, len(frames))
                frames.append(frame)
        except Malformed as error:
            broken = error
        message.frames = message.open = len(frames) + (broken is not None)
        for frame in frames:
            self.take(frame, message)
        if broken:
            self.refuse_rest(message, offset, broken)

    def take(self, frame, message):
        try:
            self.admit(frame, message)
        except Fault as fault:
            self.refuse(frame, message, fault)

    def admit(self, frame, message):
        if frame.type == wire.CANCEL:
            self.cancel(frame)
            return message.finish()
        if frame.type == wire.LOCATE and message.source == INSTANCE:
            self.locate(frame, message)
            return message.finish()
        if frame.type not in self.belongs[message.source]:
            raise Fault("UNIMPLEMENTED", f"type {frame.type} does not belong on a queue of {message.source}")
        if frame.type == wire.REQUEST and not message.properties.reply_to:
            raise Fault("INVALID_ARGUMENT", "a request without `reply_to`")
        method = frame.metadata.get(wire.METHOD, "")
        if method in ("hopline.ping", "hopline.info", "hopline.stats"):
            return self.answer(frame, message, self.about_itself(method))
        method_of = self.method_of(frame)
        known = self.known(frame, message) if method_of.once else None
        if known and not known.ended:
            return known.waiting.append((frame, message))
        if known:
            return self.answer(frame, message, known.answer) if frame.type == wire.REQUEST else message.finish()
        if frame.type == wire.REQUEST and message.delivery.redelivered and not method_of.idempotent:
            raise Fault("ABORTED", f"the instance that took `{method}` went away: it may have run")
        call = Call(frame, message)
        gone = call.deadline is not None and call.deadline <= time.monotonic()
        if gone or (frame.type == wire.REQUEST and self.cancelled.pop(frame.id, None)):
            return message.finish()
        if method_of.once:
            self.once[self.same(frame, message)] = Once(frame.id)
        self.running[frame.id] = call
        self.threads.submit(self.handle, method_of.handler, call)

    def method_of(self, frame):
        method = frame.metadata.get(wire.METHOD, "")
        if method not in self.methods:
            raise Fault("UNIMPLEMENTED", f"`{self.service}` has no method `{method}`: it has {', '.join(self.methods)}")
        return self.methods[method]

    def same(self, frame, message):
        """The key that two frames of the same call share."""
        user = message.properties.user_id
        if user == self.user:
            user = (message.properties.headers or {}).get("x-hopline-user", user) or None
        return frame.call_id, user, frame.type, frame.metadata.get(wire.METHOD), frame.serialization

    def known(self, frame, message):
        """What is known about a call that must run once. `None` if it must run now."""
        now = time.monotonic()
        self.once = {key: once for key, once in self.once.items() if not once.ended or once.until > now}
        once = self.once.get(self.same(frame, message))
        # A fault answers only the attempt that met it. Another attempt was made because of it, and runs.
        failed = once and once.ended and isinstance(once.answer, Fault) and once.attempt != frame.id
        return None if failed else once

    def end_once(self, call, answer, given_up=False):
        """Notes the end of a call. If it had to run once, this answers all deliveries that wait for it."""
        frame = call.frame
        seconds = self.method_of(frame).once
        once = self.once.pop(self.same(frame, call.message), None) if seconds else None
        if once is None:
            return
        failed = isinstance(answer, Exception)
        # A oneway call that failed is to run again.
        if not given_up and not (failed and frame.type == wire.ONEWAY):
            once.ended, once.answer, once.until = True, answer, time.monotonic() + seconds
            self.once[self.same(frame, call.message)] = once
        for other, message in once.waiting:
            if other.id != frame.id and (given_up or isinstance(answer, Fault)):
                self.take(other, message)
            elif given_up:
                message.finish()
            else:
                self.tell(other, message, answer)
        once.waiting = []

    def locate(self, frame, message):
        """Tells who asks that a call runs here. It never asks itself."""
        if frame.id in self.running and message.properties.reply_to:
            alive = Frame(wire.KEEP_ALIVE, RAW, id=frame.id, metadata={wire.INSTANCE: self.instance})
            self.publish("", message.properties.reply_to, alive.encode(), self.properties(message))

    def about_itself(self, question):
        if question == "hopline.ping":
            return None
        itself = {"type": question.replace(".", ".v1."), "service": self.service, "instance": self.instance}
        if question == "hopline.stats":
            return itself | {"running": len(self.running), "finished": self.finished}
        methods = [
            {"name": name, "signature": name, "idempotent": method.idempotent}
            for name, method in sorted(self.methods.items())
        ]
        return itself | {"hopline": "python", "methods": methods}

    def arguments(self, handler, frame):
        return arguments(handler, frame)

    def handle(self, handler, call):
        """On a thread of its own."""
        started = time.monotonic()
        try:
            answer = handler(call, *self.arguments(handler, call.frame))
        except (Fault, ServiceError) as failure:
            answer = failure
        except Exception as error:
            answer = Fault("INTERNAL", f"the handler failed: {error!r}")
        self.ended.append((call, answer, int((time.monotonic() - started) * 1_000_000)))
        self.connection.add_callback_threadsafe(lambda: None)

    def conclude(self, call, answer, handler_time):
        self.finished += 1
        if self.running.pop(call.frame.id, None) is None:
            return  # Cancelled, or over its deadline: that has been seen to.
        self.end_once(call, answer)
        self.tell(call.frame, call.message, answer, handler_time)

    def tell(self, frame, message, answer, handler_time=None):
        """Sees to a frame whose call ended like this."""
        failed = isinstance(answer, Exception)
        if frame.type == wire.REQUEST:
            self.answer(frame, message, answer, handler_time)
        elif not failed or message.source == INSTANCE:
            message.finish()
        elif isinstance(answer, Fault) and answer.status in ("INVALID_ARGUMENT", "UNIMPLEMENTED"):
            self.refuse(frame, message, answer)
        else:
            self.try_again(frame, message, answer)

    def try_again(self, frame, message, _):
        """Gives back what failed. The broker counts how often, and ends it."""
        if message.frames == 1:
            print("failed", frame.metadata[wire.METHOD], flush=True)
            message.channel.basic_reject(message.delivery.delivery_tag, requeue=True)
        else:
            self.publish("", f"{self.namespace}.{self.service}.work", frame.encode(), message.properties)
            message.finish()

    def cancel(self, frame):
        call = self.running.get(frame.id)
        if call and call.frame.type == wire.REQUEST:
            del self.running[frame.id]
            print("cancelled", call.frame.metadata[wire.METHOD], flush=True)
            call.cancelled.set()
            self.end_once(call, None, given_up=True)
            return call.message.finish()
        now = time.monotonic()
        self.cancelled = {id: until for id, until in self.cancelled.items() if until > now}
        seconds = min(frame.metadata.get(wire.REMAINING_MS, 0) / 1000, MAX_MEMORY_S)
        if seconds and len(self.cancelled) < MAX_REMEMBERED:
            self.cancelled[frame.id] = now + seconds

    def answer(self, frame, message, answer, handler_time=None):
        """Replies. Publishing waits for the confirm, so after it the frame is done with."""
        metadata = {wire.INSTANCE: self.instance, wire.ACCEPTS: wire.READABLE}
        if handler_time is not None:
            metadata[wire.HANDLER_TIME_US] = handler_time
        reply = Frame(wire.REPLY, frame.serialization, id=frame.id, metadata=metadata)
        if isinstance(answer, Fault):
            reply.status = answer.status
            metadata[wire.ERROR] = answer.message
            if answer.retry_after_ms is not None:
                metadata[wire.RETRY_AFTER_MS] = answer.retry_after_ms
        elif isinstance(answer, ServiceError):
            reply.status, reply.flags = "UNKNOWN", wire.SERVICE_ERROR
            reply.payload = encode(frame.serialization, answer.args[0])
        else:
            reply.payload = encode(frame.serialization, answer)
        if frame.metadata.get(wire.ACCEPTS, 0) & 0b10:
            reply.compress(wire.LZ4)
        body = reply.encode()
        if len(body) > MAX_SIZE:
            metadata[wire.ERROR], metadata[wire.TOO_LARGE] = "the reply is too large", [len(body), MAX_SIZE]
            body = Frame(wire.REPLY, frame.serialization, "RESOURCE_EXHAUSTED", id=frame.id, metadata=metadata).encode()
        self.publish("", message.properties.reply_to, body, self.properties(message))
        message.finish()

    def refuse(self, frame, message, fault):
        if message.properties.reply_to and frame.type != wire.ONEWAY:
            self.answer(frame, message, fault)
        else:
            self.dead_letter(message, frame.encode(), str(fault))

    def refuse_rest(self, message, offset, error):
        id = error.id
        try:
            id = id or uuid.UUID(message.properties.correlation_id or "")
        except ValueError:
            pass  # Not a UUID: nobody to name.
        if id and message.properties.reply_to:
            self.answer(Frame(wire.REQUEST, CBOR, id=id), message, Fault(error.status, str(error)))
        else:
            self.dead_letter(message, message.body[offset:], str(error))

    def dead_letter(self, message, body, reason, **headers):
        properties = self.properties(message)
        properties.delivery_mode = 2
        properties.reply_to = message.properties.reply_to
        properties.headers = {
            "x-hopline-reason": reason,
            "x-hopline-instance": self.instance,
            **origin(message),
            **{f"x-hopline-{name}": str(value) for name, value in headers.items()},
        }
        self.publish("", f"{self.namespace}.{self.service}.dead", body, properties)
        message.finish()

    def properties(self, message):
        return pika.BasicProperties(
            content_type=wire.CONTENT_TYPE,
            correlation_id=message.properties.correlation_id,
            type=message.properties.type,
            app_id=self.instance,
        )

    def publish(self, exchange, key, body, properties):
        try:
            self.publisher.basic_publish(exchange, key, body, properties, mandatory=True)
        except (UnroutableError, NackError) as refused:
            print("nobody took", key, type(refused).__name__, flush=True)  # The caller has gone, mostly.


class Group(Server):
    """An instance of a group: `handler` is given the events of `pattern`, which it shares with the other instances."""

    shares = {"work": WORK}
    belongs = {WORK: {wire.EVENT}, INSTANCE: {wire.REQUEST}}

    def __init__(self, url, name, pattern, handler, attempts=8, pause_ms=500):
        self.pattern, self.handler, self.attempts, self.pause_ms = pattern, Method(handler), attempts, pause_ms
        super().__init__(url, f"group:{name}", {})
        self.enter()

    def declare(self, own):
        self.channel.queue_bind(self.declare_kept(own), f"{self.namespace}.events", self.pattern)

    def enter(self):
        """Enters the group into the catalogue, where operators find it though nobody serves it."""
        catalogue, entry = f"{self.namespace}.services", f"{self.service} {self.pattern}".encode()
        channel = self.connection.channel()
        channel.queue_declare(catalogue, durable=True, arguments={"x-queue-type": "classic"})
        bodies = set()
        while (got := channel.basic_get(catalogue))[0]:
            bodies.add(got[2])
        # What was taken out goes back.
        channel.close()
        if entry not in bodies:
            self.publish("", catalogue, entry, pika.BasicProperties(delivery_mode=2))

    def method_of(self, frame):
        if frame.type != wire.EVENT:
            raise Fault("UNIMPLEMENTED", "a group has no methods")
        return self.handler

    def admit(self, frame, message):
        if frame.type == wire.EVENT and message.source == WORK:
            key = frame.metadata.get(wire.METHOD)
            if message.delivery.exchange and message.delivery.routing_key != key:
                raise Fault("INVALID_ARGUMENT", f"its key is {message.delivery.routing_key}, and it names {key}")
        super().admit(frame, message)

    def arguments(self, handler, frame):
        """An event is the value itself."""
        try:
            return [decode(frame.serialization, frame.plain())]
        except Exception as error:
            raise Fault("INVALID_ARGUMENT", f"the event cannot be read: {error}") from error

    def try_again(self, frame, message, why):
        """Has the event wait at the broker for its next attempt, of any instance. The last one makes it a dead letter."""
        headers = message.properties.headers or {}
        attempt = frame.metadata.get(wire.ATTEMPT, 1) + headers.get("x-delivery-count", 0)
        if attempt >= self.attempts:
            return self.dead_letter(message, frame.encode(), str(why), attempts=attempt, id=frame.id)
        frame.metadata[wire.ATTEMPT] = attempt + 1
        properties = self.properties(message)
        properties.delivery_mode = 2
        properties.expiration = str(min(self.pause_ms * 2 ** (attempt - 1), 30_000))
        properties.headers = origin(message)
        retry, arguments = f"{self.namespace}.{self.service}.retry", {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": f"{self.namespace}.{self.service}.work",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        self.channel.queue_declare(retry, durable=True, arguments=arguments)
        self.publish("", retry, frame.encode(), properties)
        message.finish()


def origin(message):
    """The headers that say where a message was published first."""
    headers, delivery = message.properties.headers or {}, message.delivery
    return {
        "x-hopline-exchange": headers.get("x-hopline-exchange", delivery.exchange),
        "x-hopline-key": headers.get("x-hopline-key", delivery.routing_key),
    }


def arguments(handler, frame):
    """The arguments of a frame, if the handler takes as many."""
    try:
        values = decode(frame.serialization, frame.plain())
        if frame.serialization == RAW:
            values = [values] if values else []
        if not isinstance(values, list):
            raise TypeError("not an array")
        inspect.signature(handler).bind(None, *values)
    except wire.Unreadable as error:
        raise Fault(error.status, str(error)) from error
    except Exception as error:
        raise Fault("INVALID_ARGUMENT", f"the arguments cannot be read: {error}") from error
    return values


def add(call, a, b):
    return a + b


def repeat(call, text, times):
    return text * times


def fail(call):
    raise ServiceError({"Refused": {"why": "as asked"}})


def slow(call, milliseconds):
    call.cancelled.wait(milliseconds / 1000)


def note(call, line):
    print("note:", line, flush=True)


def main():
    methods = {
        "add": Method(add),
        "repeat": Method(repeat),
        "fail": Method(fail),
        "slow": Method(slow, idempotent=True),
        "note": Method(note, once=600),
    }
    server = Server(sys.argv[1], "pyserv.v1", methods)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    print("ready", server.instance, flush=True)
    server.run()


if __name__ == "__main__":
    main()
