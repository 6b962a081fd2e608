"""The engine and the service on a GPU beside flash-linear-attention and the device's limits, in one run: a Markdown table.

    python3 tests/bench/gpu_report.py --programs build/cuda/bin [--parts limits,operators,engine,service] [--json FILE]

Wants PyTorch with CUDA for the limits and, for the middle column, flash-linear-attention (without it that column is
empty; it compiles its kernels on first use, which takes minutes). The model is flash-linear-attention's 1.3B shape
(hidden 2048, 24 layers, 16 heads of 128, intermediate 5632, 32,000 ids) with random weights in bfloat16. Times are
medians: "graph", of the replays of a CUDA graph, so the GPU's work alone; "called", what a Python caller waits for.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "python"))

import programs

try:
    import torch
except ImportError:
    torch = None
try:
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM
    from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
except ImportError:
    chunk_delta_rule = None

HEADS, SIZE = 16, 128
RAGGED = [1, 3, 17, 40, 64, 65, 100, 128, 130, 200, 256, 300, 31, 77, 513, 700, 1024, 1500, 90, 45, 12, 333, 222, 111, 64,
          64, 800, 950, 60, 5, 9, 999]
# Case of delta_rule_cuda_bench: lengths, heads, size.
PREFILL = {
    "8 x 2048, 16 heads of 128": ([2048] * 8, HEADS, SIZE),
    "1 x 8192, 16 heads of 128": ([8192], HEADS, SIZE),
    "1 x 32768, 16 heads of 128": ([32768], HEADS, SIZE),
    "32 x 512, 16 heads of 128": ([512] * 32, HEADS, SIZE),
    "64 x 64, 16 heads of 128": ([64] * 64, HEADS, SIZE),
    "32 ragged rows, 16 heads of 128": (RAGGED, HEADS, SIZE),
    "8 x 4096, 32 heads of 64": ([4096] * 8, 32, 64),
    "8 x 2048, 8 heads of 256": ([2048] * 8, 8, 256),
}
DECODE = [64, 256, 1024]
TOKEN, WHOLE, COPIED = "a token of ", "with convolutions, of ", "their states copied, of "
PROMPTS = [(8, 2048), (1, 16384), (1, 2048), (1, 512), (64, 64)]
SESSIONS = [1, 16, 64, 256]
LAYERS, WIDTH, INTERMEDIATE, VOCABULARY = 24, 2048, 5632, 32000
# Of the matrices that a token goes through, the head apart: q, k, v and o, beta, gate, up and down.
LAYER_WEIGHTS = LAYERS * (4 * WIDTH * WIDTH + HEADS * WIDTH + 3 * WIDTH * INTERMEDIATE)
STATE_BYTES = LAYERS * HEADS * SIZE * SIZE * 4


def called(work, repeats):
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def graphed(work, repeats=30):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def limits():
    """Bytes a second that a copy reads and writes, and FLOP a second of a large product."""
    x = torch.zeros(1 << 29, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / graphed(lambda: torch.add(x, 1.0, out=y))
    del x, y
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {"bytes": copy, "flops": 2 * 8192**3 / graphed(lambda: m @ m)}


class FlashLinearAttention:
    """Its times in seconds, by the names of the table's rows: (graph, called), None where it has none."""

    def operators(self):
        times = {}

        def inputs(batch, tokens, heads, size):
            random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
            return dict(q=random(batch, tokens, heads, size), k=random(batch, tokens, heads, size),
                        v=random(batch, tokens, heads, size), beta=random(batch, tokens, heads).sigmoid(),
                        output_final_state=True, use_qk_l2norm_in_kernel=True)

        with torch.no_grad():
            for case, (lengths, heads, size) in PREFILL.items():
                state = torch.zeros(len(lengths), heads, size, size, device="cuda")
                if len(set(lengths)) == 1:
                    x = inputs(len(lengths), lengths[0], heads, size)
                else:
                    x = inputs(1, sum(lengths), heads, size)
                    x["cu_seqlens"] = torch.tensor([0, *lengths], device="cuda").cumsum(0)
                times[case] = self.both(lambda: chunk_delta_rule(**x, initial_state=state))
            for sessions in DECODE:
                x = inputs(sessions, 1, HEADS, SIZE)
                state = torch.randn(sessions, HEADS, SIZE, SIZE, device="cuda")
                times[f"{TOKEN}{sessions}"] = self.both(lambda: fused_recurrent_delta_rule(**x, initial_state=state))
        return times

    def model(self):
        config = DeltaNetConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_heads=HEADS, intermediate_size=INTERMEDIATE,
                                vocab_size=VOCABULARY, tie_word_embeddings=False)
        model = DeltaNetForCausalLM(config).to("cuda", torch.bfloat16).eval()
        times = {}
        with torch.no_grad():
            for batch, tokens in PROMPTS:
                ids = torch.randint(0, VOCABULARY, (batch, tokens), device="cuda")
                times[f"{batch} x {tokens}"] = (None, called(lambda: model(ids, use_cache=True, logits_to_keep=1), 7))
            for sessions in SESSIONS:
                ids = torch.randint(0, VOCABULARY, (sessions, 64), device="cuda")
                cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
                times[f"{TOKEN}{sessions}"] = self.both(
                    lambda: model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1))
                del cache
        return times

    @staticmethod
    def both(work):
        once = called(work, 15)
        try:
            return graphed(work), once
        except Exception:  # What synchronises cannot be captured.
            torch.cuda.synchronize()
            return None, once


def operators(bench):
    """Our kernels' seconds, by case."""
    times = {}
    for line in subprocess.run([bench], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines():
        if not line.startswith("{"):
            continue
        case = json.loads(line)
        seconds = case["us"] / 1e6
        if case["case"].startswith("mixer"):
            kind, size = case["case"].split(", ")[:2]
            if size.endswith(" x 1"):
                times[(WHOLE if kind == "mixer" else TOKEN) + size.split()[0]] = seconds
        elif case["case"].startswith("states copied, "):
            times[COPIED + case["case"].split(", ")[1]] = seconds
        elif case["out"] == "bfloat16" or case["case"] not in times:
            times[case["case"]] = seconds
    return times


def of_a_layer(bench):
    """Shows the operators of a layer, and returns the seconds by operator and tokens."""
    cases = [json.loads(line) for line in
             subprocess.run([bench], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines() if '"op"' in line]
    print("\nThe operators of a layer, bfloat16 where not said otherwise, and the readout: us (share of a copy's rate)\n")
    cells = {(case["op"], case["tokens"]): f"{case['us']:.1f} ({case['of_copy']:.2f})" for case in cases}
    tokens = sorted({case["tokens"] for case in cases})
    print("| tokens | " + " | ".join(map(str, tokens)) + " |\n" + "| --- " * (len(tokens) + 1) + "|")
    for op in dict.fromkeys(case["op"] for case in cases):
        print(f"| {op} | " + " | ".join(cells.get((op, n), "") for n in tokens) + " |")
    return {f"{case['op']}, {case['tokens']} tokens": case["us"] / 1e6 for case in cases}


def engine(bench, directory):
    """The engine's seconds a step, by row of the table; and of small steps of streams, by sessions and tokens."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([bench, f"--benchmark_out={file.name}", "--benchmark_out_format=json", "--benchmark_min_time=0.5",
                        "--benchmark_filter=(Prefill|Generate)/large/cuda_bfloat16|Sessions/small/cuda_float32"],
                       check=True, stdout=subprocess.DEVNULL, env={**programs.os.environ, "DELTANET_BENCH_MODEL_DIR": directory})
        results = json.load(open(file.name))["benchmarks"]
    scale = {"ms": 1e-3, "us": 1e-6}
    times, streams = {}, {}
    for result in results:
        kind, *parts = result["name"].split("/")
        arguments = dict(part.split(":") for part in parts if ":" in part)
        seconds = result["real_time"] * scale[result["time_unit"]]
        if kind == "Prefill":
            times[f"{arguments['B']} x {arguments['T']}"] = seconds
        elif kind == "Generate":
            times[f"{TOKEN}{arguments['N']}"] = seconds
        elif arguments["in_flight"] == "1":
            streams[int(arguments["N"]), int(arguments["T"])] = seconds
    return times, streams


def service(folder, large, small):
    """Seconds a token of generations, by row of the table, and the median latency of a stream's chunk, as engine()."""
    client = folder / "deltanet-client"

    def bench(server, *flags):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            subprocess.run([client, "bench", f"--server={server.address}", f"--json={file.name}", *flags], check=True,
                           stdout=subprocess.DEVNULL)
            return json.load(open(file.name))

    times, streams = {}, {}
    with programs.Server(folder / "deltanet-server", {"lm": large}, "--device=cuda", "--dtype=bfloat16") as server:
        for sessions in SESSIONS:
            result = bench(server, "--generate", f"--concurrency={sessions}", f"--connections={min(4, sessions)}",
                           "--prompt-tokens=64", "--output-tokens=512", "--seconds=6")
            times[f"{TOKEN}{sessions}"] = sessions / result["output_tokens_per_second"]
    with programs.Server(folder / "deltanet-server", {"m": small}, "--device=cuda") as server:
        for sessions, tokens in [(1, 1), (1, 16), (16, 16)]:
            result = bench(server, f"--sessions={sessions}", f"--chunk={tokens}", "--duration=3s")
            streams[sessions, tokens] = result["latency_ms"]["p50"] / 1e3
    return times, streams


def show(title, unit, rows, ours, theirs, served, floor):
    """A table of a row a case; times in seconds, floor(case) too."""
    scale = {"us": 1e6, "ms": 1e3}[unit]
    number = lambda seconds: "" if seconds is None else f"{seconds * scale:.3g}"
    head = ["", f"ours, {unit}", *(["gRPC"] if served else []), "flash-linear-attention: graph", "called", "floor", "of the floor"]
    print(f"\n{title}\n")
    print("| " + " | ".join(head) + " |")
    print("| --- " * len(head) + "|")
    for case in rows:
        graph, once = theirs.get(case, (None, None))
        least = floor(case)
        cells = [case, number(ours.get(case)), *([number(served.get(case))] if served else []), number(graph), number(once),
                 number(least), f"{ours[case] / least:.2f}" if least and ours.get(case) else ""]
        print("| " + " | ".join(cells) + " |")


def operator_bytes(case):
    if case in PREFILL:
        lengths, heads, size = PREFILL[case]
        return sum(lengths) * heads * (4 * size + 1) * 2 + 8 * len(lengths) * heads * size * size
    sessions, moved = int(case.split()[-1]), 8 * HEADS * SIZE * SIZE
    if not case.startswith(COPIED):
        moved += 2 * 4 * WIDTH
    if case.startswith(WHOLE):  # The convolutions remember 3 inputs of 3 x 2048 channels, in bfloat16.
        moved += 4 * 3 * 3 * WIDTH
    return sessions * moved


def model_floor(case, limit):
    """Weights and states read once and products at full rate, whichever takes longer."""
    numbers = [int(word) for word in case.split() if word.isdigit()]
    rows, tokens = numbers if " x " in case else (numbers[0], 1)
    flops = 2 * rows * (tokens * LAYER_WEIGHTS + WIDTH * VOCABULARY)
    moved = 2 * (LAYER_WEIGHTS + WIDTH * VOCABULARY) + 2 * STATE_BYTES * rows
    return max(flops / limit["flops"], moved / limit["bytes"])


def keep(found, path):
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, required=True, help="folder of the programs built with preset cuda")
    parser.add_argument("--parts", default="limits,operators,engine,service")
    parser.add_argument("--json", type=pathlib.Path, help="write all times (seconds) there too")
    options = parser.parse_args()
    parts = options.parts.split(",")
    sys.stdout.reconfigure(line_buffering=True)  # What is found is seen, should the rest take too long.
    theirs = FlashLinearAttention() if chunk_delta_rule is not None else None

    if torch is not None:
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", end="")
    limit = limits() if torch is not None and "limits" in parts else None
    if limit:
        print(f": copies {limit['bytes'] / 1e12:.2f} TB/s, bfloat16 products {limit['flops'] / 1e12:.0f} TFLOP/s")
    found = {"limits": limit}
    keep(found, options.json)
    if "operators" in parts:
        ours = operators(options.programs / "delta_rule_cuda_bench")
        fla = theirs.operators() if theirs else {}
        rows = [*PREFILL, *(f"{work}{sessions}" for sessions in DECODE for work in (TOKEN, WHOLE, COPIED))]
        show("The delta rule alone, with L2 norms; of a token the mixer without its convolutions, which has the output norm "
             "too, then with them, and what a plain copy of the same states from slot to slot takes", "us", rows, ours,
             fla, None, lambda case: operator_bytes(case) / limit["bytes"] if limit else None)
        layer = of_a_layer(options.programs / "ops_cuda_bench")
        found["operators"] = {"ours": ours, "theirs": fla, "of a layer": layer}
        keep(found, options.json)
    if "engine" in parts or "service" in parts:
        with tempfile.TemporaryDirectory() as folder:
            large, small = f"{folder}/large", f"{folder}/small"
            client = options.programs / "deltanet-client"
            programs.make_model(client, large, "delta_net", d_model=WIDTH, num_layers=LAYERS, num_heads=HEADS,
                                intermediate_size=INTERMEDIATE, vocab_size=VOCABULARY, dtype="bfloat16")
            programs.make_model(client, small, "transformer_deltanet", d_model=64, num_layers=6)
            ours, steps = engine(options.programs / "engine_bench", large) if "engine" in parts else ({}, {})
            served, chunks = service(options.programs, large, small) if "service" in parts else ({}, {})
        fla = theirs.model() if theirs and "engine" in parts else {}
        rows = [*(f"{b} x {t}" for b, t in PROMPTS), *(f"{TOKEN}{n}" for n in SESSIONS)]
        show("The 1.3B model: prompts, and a token of N sessions", "ms", rows, ours, fla, served,
             lambda case: model_floor(case, limit) if limit else None)
        for (sessions, tokens), seconds in chunks.items():
            step = steps.get((sessions, tokens))
            print(f"\nTransformerDeltaNet(64, num_layers=6), {sessions} streams of chunks of {tokens}: p50 {seconds * 1e6:.0f} us"
                  + (f", the engine's step {step * 1e6:.0f} us" if step else ""))
        found["model"] = {"ours": ours, "gRPC": served, "theirs": fla}
        keep(found, options.json)


if __name__ == "__main__":
    main()
