"""The service under mixed clients, faults, drains and restarts: does it end where it began?

    soak.py [--seconds S] [--lives N] [--rounds N] DELTANET_SERVER DELTANET_CLIENT

Each life of the server: a warm-up, then rounds of clients that stream, call, cancel, time out, vanish and send nonsense,
every answer checked; after each round, with all clients gone, no session, no slot and no queued work may be left, and
memory, threads and descriptors are measured. At the end of a life the server is drained under load, which must end it with 0.

Does memory level off? Give it many rounds in one life: the report ends with the memory after each.
"""

import argparse
import collections
import contextlib
import pathlib
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request

import grpc
import numpy as np

import programs
import reference
from deltanet.v1 import deltanet_pb2 as pb
from deltanet.v1 import deltanet_pb2_grpc

WIDTH, TOKENS = 32, 300
CLIENTS = 8
TIMEOUT = 60
Code = grpc.StatusCode

# What may be left over after the warm-up: the allocator's and gRPC's pools breathe.
EXTRA_RESIDENT_BYTES = 16 << 20
EXTRA_THREADS = 4
EXTRA_FDS = 0


def tensor(array):
    return pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=array.shape, data=array.astype(np.float32).tobytes())


def chunks_of(generator, x):
    begin = 0
    while begin < len(x):
        end = min(len(x), begin + generator.choice((1, 7, 64, 100)))
        yield x[begin:end], end == len(x)
        begin = end


def mebibytes(size):
    return f"{size / 2**20:.1f}"


class Unexpected(Exception):
    pass


class Client:
    """One client: does things at random until told to stop, over a connection of its own."""

    def __init__(self, soak, number):
        self.soak = soak
        self.random = random.Random(number)
        self.x = np.random.default_rng(number).standard_normal((TOKENS, WIDTH), np.float32)
        self.y = soak.reference(self.x)
        self.connect()

    def connect(self):
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(self.soak.server.address, options)
        self.stub = deltanet_pb2_grpc.DeltaNetServiceStub(self.channel)

    def run(self):
        kinds = [self.one_shot, self.stream, self.stream, self.session, self.abandon, self.cancel, self.vanish,
                 self.late, self.nonsense, self.garbage, self.scrape]
        while not self.soak.stop.is_set():
            kind = self.random.choice(kinds)
            try:
                kind()
                self.soak.count(kind.__name__)
            except grpc.RpcError as error:
                # A full server and one that goes down may refuse; nothing else may fail.
                expected = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)
                if self.soak.draining.is_set():
                    expected += (Code.CANCELLED, Code.NOT_FOUND)
                if error.code() not in expected:
                    self.soak.fail(f"{kind.__name__}: {error.code()}: {error.details()}")
                self.soak.count(f"{kind.__name__} refused")
            except Exception as error:
                if not (self.soak.draining.is_set() and isinstance(error, OSError)):
                    self.soak.fail(f"{kind.__name__}: {error!r}")
        self.channel.close()

    def check(self, found, begin, end):
        found = np.frombuffer(found.data, np.float32).reshape(found.shape)
        wanted = self.y[begin:end]
        # A first chunk may be shorter than what the model sees ahead, and give nothing.
        if found.shape != wanted.shape or len(found) > 0 and reference.relative_error(found, wanted) > 1e-4:
            raise Unexpected(f"output {begin}:{end} is wrong")

    def requests(self, stream_session=0, **fields):
        for chunk, last in chunks_of(self.random, self.x):
            yield pb.StreamForwardRequest(stream_session=stream_session, input=tensor(chunk), end_of_sequence=last, **fields)

    def one_shot(self):
        reply = self.stub.Forward(pb.ForwardRequest(input=tensor(self.x)), timeout=TIMEOUT)
        self.check(reply.output, 0, TOKENS)

    def stream(self):
        end = 0
        for reply in self.stub.StreamForward(self.requests(), timeout=TIMEOUT):
            if reply.HasField("error"):
                if reply.error.code in (Code.UNAVAILABLE.value[0], Code.RESOURCE_EXHAUSTED.value[0],
                                        Code.FAILED_PRECONDITION.value[0]):
                    return
                raise Unexpected(reply.error.message)
            size = reply.output.shape[0]
            self.check(reply.output, end, end + size)
            end += size
        if end != TOKENS and not self.soak.draining.is_set():
            raise Unexpected(f"a stream ended after {end} of {TOKENS} outputs")

    def session(self, end=True):
        created = self.stub.Forward(
            pb.ForwardRequest(session=pb.SessionRef(create=True), input=tensor(self.x[:10])), timeout=TIMEOUT)
        if not end:
            return
        reply = self.stub.Forward(
            pb.ForwardRequest(session=pb.SessionRef(id=created.session_id), input=tensor(self.x[10:]), end_of_sequence=True,
                              expected_position=10), timeout=TIMEOUT)
        self.check(reply.output, reply.output_position, TOKENS)

    def abandon(self):
        self.session(end=False)

    def cancel(self):
        call = self.stub.StreamForward(self.requests(), timeout=TIMEOUT)
        next(call)
        call.cancel()

    def vanish(self):
        call = self.stub.StreamForward(self.requests(), timeout=TIMEOUT)
        next(call)
        self.channel.close()
        self.connect()

    def late(self):
        try:
            self.stub.Forward(pb.ForwardRequest(input=tensor(self.x)), timeout=0.002)
        except grpc.RpcError as error:
            if error.code() != Code.DEADLINE_EXCEEDED:
                raise
        requests = list(self.requests())
        requests[-1].timeout.FromMicroseconds(1)
        last = list(self.stub.StreamForward(iter(requests), timeout=TIMEOUT))[-1]
        if not last.HasField("error"):
            raise Unexpected("a message was computed in a microsecond")

    def nonsense(self):
        for request, code in (
            (pb.ForwardRequest(input=tensor(self.x[:, :5])), Code.INVALID_ARGUMENT),
            (pb.ForwardRequest(input=tensor(self.x * np.float32(np.nan))), Code.INVALID_ARGUMENT),
            (pb.ForwardRequest(model="nobody", input=tensor(self.x)), Code.NOT_FOUND),
            (pb.ForwardRequest(session=pb.SessionRef(id="nobody"), input=tensor(self.x)), Code.NOT_FOUND),
            (pb.ForwardRequest(request_id="x" * 1000, input=tensor(self.x)), Code.INVALID_ARGUMENT),
        ):
            try:
                self.stub.Forward(request, timeout=TIMEOUT)
            except grpc.RpcError as error:
                if error.code() != code:
                    raise
            else:
                raise Unexpected(f"was taken: {str(request)[:200]}")

    def garbage(self):
        for address in (self.soak.server.address, self.soak.server.metrics_address):
            host, port = address.rsplit(":", 1)
            with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection, \
                    contextlib.suppress(OSError):
                connection.sendall(self.random.randbytes(self.random.randrange(200)))

    def scrape(self):
        self.soak.metrics()


class Soak:
    def __init__(self, server_program, directory):
        self.program, self.directory = server_program, directory
        self.reference = reference.Model(directory)
        self.counts = collections.Counter()
        self.failures = []
        self.lock = threading.Lock()
        self.stop, self.draining = threading.Event(), threading.Event()

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def fail(self, why):
        with self.lock:
            self.failures.append(why)
        self.stop.set()

    def metrics(self):
        with urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics", timeout=TIMEOUT) as reply:
            lines = reply.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    @contextlib.contextmanager
    def clients(self, round_number):
        self.stop.clear()
        clients = [Client(self, CLIENTS * round_number + number) for number in range(CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()

    def rest(self):
        """Waits until the server holds nothing any more, and returns its metrics then."""
        wanted = {'deltanet_sessions{model="m"}': 0, "deltanet_queued_works": 0, "deltanet_queued_tokens": 0}
        deadline = time.monotonic() + 30
        while True:
            now = self.metrics()
            wanted['deltanet_slots_free{model="m"}'] = now['deltanet_slots{model="m"}']
            wrong = {name: now[name] for name, value in wanted.items() if now[name] != value}
            if not wrong:
                return now
            if time.monotonic() > deadline:
                raise Unexpected(f"with all clients gone for 30 s: {wrong}, want {wanted}")
            time.sleep(0.2)

    def measure(self, name):
        now = self.rest()
        # Connections of the last round are taken down in the background.
        least = None
        for _ in range(10):
            used = {key: int(now[f"process_{key}"]) for key in ("resident_memory_bytes", "threads", "open_fds")}
            used["anonymous_bytes"] = self.server.anonymous_bytes()
            least = used if least is None else {key: min(value, used[key]) for key, value in least.items()}
            time.sleep(0.2)
            now = self.metrics()
        tokens = now['deltanet_tokens_total{model="m"}']
        print(f"  {name}: {mebibytes(least['resident_memory_bytes'])} MiB resident, "
              f"{mebibytes(least['anonymous_bytes'])} of them of no file, {least['threads']} threads, "
              f"{least['open_fds']} descriptors, {now['process_cpu_seconds_total']:.0f} s of CPU, "
              f"{tokens:.0f} tokens", flush=True)
        return least

    def live(self, life, seconds, rounds):
        self.draining.clear()
        flags = ["--session-ttl=1s", "--max-sessions=64", "--max-queued-requests=256", "--drain-timeout=20s"]
        with programs.Server(self.program, {"m": self.directory}, *flags) as self.server:
            measured = []
            for number in range(rounds):
                with self.clients(life * rounds + number):
                    self.stop.wait(seconds / rounds)
                self.check()
                measured.append(self.measure("warm-up" if number == 0 else f"round {number}"))
            for name, key in (("resident", "resident_memory_bytes"), ("of no file", "anonymous_bytes")):
                print(f"  MiB {name} after each round:", *(mebibytes(used[key]) for used in measured), flush=True)
            begin, end = measured[0], measured[-1]
            for key, extra in (("resident_memory_bytes", EXTRA_RESIDENT_BYTES), ("threads", EXTRA_THREADS),
                               ("open_fds", EXTRA_FDS)):
                if end[key] > begin[key] + extra:
                    raise Unexpected(f"{key}: {begin[key]} after the warm-up, {end[key]} at the end")
            with self.clients(life * rounds):
                self.stop.wait(1)
                self.draining.set()
                self.server.process.send_signal(signal.SIGTERM)
                status = self.server.process.wait(TIMEOUT)
            self.check()
            drained = "drained=true" in self.server.wait_for_log("stopped")
            print(f"  drained under load: exit status {status}, all calls ended by themselves: {drained}", flush=True)

    def check(self):
        if self.failures:
            raise Unexpected("; ".join(self.failures))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--lives", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="of each life, the warm-up among them")
    parser.add_argument("server", type=pathlib.Path)
    parser.add_argument("client", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        programs.make_model(arguments.client, f"{directory}/m", "transformer_deltanet", d_model=WIDTH, num_layers=2, seed=1)
        soak = Soak(arguments.server, f"{directory}/m")
        for life in range(arguments.lives):
            print(f"life {life + 1} of the server", flush=True)
            try:
                soak.live(life, arguments.seconds / arguments.lives, arguments.rounds)
            except Unexpected as error:
                sys.exit(f"soak: {error}")
    print("done: " + ", ".join(f"{what} {count}" for what, count in sorted(soak.counts.items())))


if __name__ == "__main__":
    main()
