"""The whole service, through gRPC on loopback, against the same model in plain PyTorch on the same CPU in one run.

    deploy/install.sh test bench        # PyTorch is needed here alone
    PYTHONPATH=build/release/tests/python/stubs ~/.cache/deltanet/venv/bin/python tests/bench/service_bench.py

The model is TransformerDeltaNet(64, chunk_size=4, num_layers=6) over (8, 128, 64). Without PyTorch only the service is
measured. Every part of the run is repeated in
turns with the others, so that a slow minute of the machine meets all of them; medians are told.
"""

import argparse
import json
import pathlib
import queue
import statistics
import subprocess
import sys
import tempfile
import time

import grpc
import numpy as np

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(root / "tests" / "python"))

import programs
import reference
from deltanet.v1 import deltanet_pb2 as pb
from deltanet.v1 import deltanet_pb2_grpc

try:
    import torch

    import pytorch_model
except (ImportError, OSError):  # The latter where its CUDA libraries are missing.
    torch = None

WIDTH, CHUNK_SIZE, LAYERS = 64, 4, 6
BATCH, TOKENS = 8, 128

# Flags of deltanet-client bench.
LOADS = {
    "one_shot": ["--unary", f"--batch={BATCH}", f"--chunk={TOKENS}", "--sessions=1"],
    "streams": ["--sessions=64", "--chunk=16"],
    "token": ["--sessions=1", "--chunk=1"],
}


class PyTorch:
    def __init__(self, directory):
        self.model = pytorch_model.TransformerDeltaNet(WIDTH, CHUNK_SIZE, LAYERS)
        weights = reference.read_safetensors(directory / "model.safetensors")
        self.model.load_state_dict({name: torch.tensor(values) for name, values in weights.items()})

    def __call__(self, x):
        with torch.inference_mode():
            return self.model(torch.from_numpy(x)).numpy()

    def milliseconds(self, x, seconds):
        """The median time of a call, over calls that take `seconds` together."""
        times = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            self(x)
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)


def load(client, server, seconds, *flags):
    """The JSON of one run of deltanet-client bench."""
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run([client, "bench", f"--server={server.address}", f"--duration={seconds}s", f"--json={file.name}",
                        *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = json.load(file)
    if found["errors"] or found["unanswered"]:
        raise RuntimeError(f"bench had errors: {found}")
    return found


def forward(stub, x):
    reply = stub.Forward(pb.ForwardRequest(input=tensor(x)))
    return np.frombuffer(reply.output.data, np.float32).reshape(reply.output.shape)


def tensor(x):
    return pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())


class LockstepStream:
    """A stream of one session, a message at a time."""

    def __init__(self, stub):
        self.requests = queue.SimpleQueue()
        self.replies = stub.StreamForward(iter(self.requests.get, None))

    def send(self, x):
        self.requests.put(pb.StreamForwardRequest(input=tensor(x)))
        reply = next(self.replies)
        if reply.HasField("error"):
            raise RuntimeError(reply.error.message)
        return reply

    def close(self):
        self.requests.put(None)
        for _ in self.replies:
            pass


def cost_by_position(stub, server, positions, messages=1000):
    """What a message of one token costs, and the server's memory, where a stream has come to each of `positions`."""
    x = np.random.default_rng(2).standard_normal((1024, WIDTH), np.float32)
    stream = LockstepStream(stub)
    at = 0
    found = []
    for position in positions:
        while at < position:
            at = stream.send(x[: position - at]).committed_position
        latencies, computing = [], []
        for _ in range(messages):
            start = time.perf_counter()
            reply = stream.send(x[:1])
            latencies.append(time.perf_counter() - start)
            computing.append(reply.timing.computing.ToTimedelta().total_seconds())
        at = reply.committed_position
        found.append({
            "position": position,
            "latency_us": 1e6 * statistics.median(latencies),
            "computing_us": 1e6 * statistics.median(computing),
            "server_resident_bytes": server.resident_bytes(),
        })
    stream.close()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=root / "build" / "release" / "bin",
                        help="folder of deltanet-server and deltanet-client")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and of the server alike")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement in a round")
    parser.add_argument("--last-position", type=int, default=1_000_000, help="to which the long stream goes")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
    flags = parser.parse_args()
    client = flags.bin / "deltanet-client"

    with tempfile.TemporaryDirectory() as directory:
        model = pathlib.Path(directory) / "model"
        programs.make_model(client, model, "transformer_deltanet", d_model=WIDTH, num_layers=LAYERS,
                            chunk_size=CHUNK_SIZE, seed=1)
        x = np.random.default_rng(1).standard_normal((BATCH, TOKENS, WIDTH), np.float32)
        with programs.Server(flags.bin / "deltanet-server", {"bench": model}, f"--threads={flags.threads}") as server, \
                grpc.insecure_channel(server.address) as channel:
            stub = deltanet_pb2_grpc.DeltaNetServiceStub(channel)
            results = {"threads": flags.threads}
            if torch:
                torch.set_num_threads(flags.threads)
                pytorch = PyTorch(model)
                difference = reference.relative_error(forward(stub, x), pytorch(x))
                if not difference < 1e-4:
                    raise RuntimeError(f"the service and PyTorch differ by {difference}, want less than 1e-4")
                results |= {"pytorch": torch.__version__, "relative_difference": difference}
            rounds = []
            for _ in range(flags.rounds):
                measured = {}
                if torch:
                    measured["pytorch_ms"] = pytorch.milliseconds(x, flags.seconds)
                    measured["pytorch_tokens_per_second"] = BATCH * TOKENS / measured["pytorch_ms"] * 1e3
                for name, load_flags in LOADS.items():
                    found = load(client, server, flags.seconds, *load_flags)
                    measured[f"{name}_tokens_per_second"] = found["tokens_per_second"]
                    measured[f"{name}_p50_ms"] = found["latency_ms"]["p50"]
                    measured[f"{name}_p99_ms"] = found["latency_ms"]["p99"]
                measured["streams_to_one_shot"] = (
                    measured["streams_tokens_per_second"] / measured["one_shot_tokens_per_second"])
                if torch:
                    measured["one_shot_to_pytorch"] = (
                        measured["one_shot_tokens_per_second"] / measured["pytorch_tokens_per_second"])
                rounds.append(measured)
            results["positions"] = cost_by_position(stub, server, [1000, flags.last_position])

    results["rounds"] = rounds
    results["median"] = median = {name: statistics.median(entry[name] for entry in rounds) for name in rounds[0]}
    print(f"TransformerDeltaNet({WIDTH}, chunk_size={CHUNK_SIZE}, num_layers={LAYERS}), {flags.threads} threads")
    shape = f"({BATCH},{TOKENS},{WIDTH})"
    if torch:
        print(f"PyTorch {torch.__version__}, {shape}: {median['pytorch_ms']:.2f} ms, "
              f"{median['pytorch_tokens_per_second']:.0f} tokens/s")
    print(f"service, {shape}: {median['one_shot_p50_ms']:.2f} ms, {median['one_shot_tokens_per_second']:.0f} tokens/s")
    if torch:
        print(f"    {median['one_shot_to_pytorch']:.2f} x PyTorch; the outputs differ by {difference:.1e} of the largest")
    print(f"64 streams, chunks of 16: {median['streams_p50_ms']:.2f} ms, {median['streams_tokens_per_second']:.0f} tokens/s, "
          f"{median['streams_to_one_shot']:.2f} x one-shot")
    print(f"1 stream, a token at a time: {1e3 * median['token_p50_ms']:.0f} us p50, "
          f"{1e3 * median['token_p99_ms']:.0f} us p99")
    for entry in results["positions"]:
        print(f"at position {entry['position']}: {entry['latency_us']:.0f} us a token (computing "
              f"{entry['computing_us']:.0f} us), server memory {entry['server_resident_bytes'] / 2**20:.1f} MiB")
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
