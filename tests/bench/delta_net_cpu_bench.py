"""The engine against the same `delta_net` layers in plain PyTorch, on the same CPU in one run.

    deploy/install.sh test bench        # PyTorch is needed here alone
    ~/.cache/deltanet/venv/bin/python tests/bench/delta_net_cpu_bench.py [--bin build/release/bin]

Two layers of the 1.3B model's width (hidden 2048, 16 heads of 128, intermediate 5632, 32,000 ids), random weights,
float32. Parts take turns, --rounds times; medians are told. PyTorch's own answer to a golden case is checked first.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import pytorch_delta_net

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(root / "tests" / "python"))
import reference

PREFILL = [(1, 512), (8, 64)]
GENERATE = [1, 16, 64, 256]


def load(directory):
    weights = {name: torch.tensor(values, dtype=torch.float32)
               for name, values in reference.read_safetensors(directory / "model.safetensors").items()}
    return pytorch_delta_net.DeltaNetLM(weights, json.loads((directory / "config.json").read_text()))


def check():
    golden = root / "tests" / "testdata" / "golden" / "fla_default"
    case = reference.read_safetensors(golden / "golden.safetensors")
    ids, want = torch.tensor(case["input_ids"]), torch.tensor(case["logits"])
    model = load(golden)
    logits, cache = model(ids[:, :100])
    for t in range(100, 110):
        logits, cache = model(ids[:, t:t + 1], cache)
    error = (logits - want[:, 109]).abs().max() / want.abs().max()
    if error > 1e-4:
        sys.exit(f"PyTorch's model is wrong: error {error:.1e}, want at most 1e-4")


def median_seconds(run, seconds):
    run()
    times = []
    begin = time.monotonic()
    while not times or time.monotonic() - begin < seconds:
        start = time.monotonic()
        run()
        times.append(time.monotonic() - start)
    return statistics.median(times)


def pytorch(model, seconds):
    tokens_per_second = {}
    for batch, tokens in PREFILL:
        ids = torch.randint(0, 32000, (batch, tokens))
        tokens_per_second[f"Prefill {batch} x {tokens}"] = batch * tokens / median_seconds(lambda: model(ids), seconds)
    for batch in GENERATE:
        logits, cache = model(torch.randint(0, 32000, (batch, 64)))
        state = [logits.argmax(-1, keepdim=True), cache]

        def step():
            logits, state[1] = model(state[0], state[1])
            state[0] = logits.argmax(-1, keepdim=True)

        tokens_per_second[f"Generate {batch}"] = batch / median_seconds(step, seconds)
    return tokens_per_second


def engine(binaries, directory, seconds):
    output = subprocess.run(
        [binaries / "engine_bench", "--benchmark_filter=^(Prefill|Generate)/large/cpu", "--benchmark_format=json",
         f"--benchmark_min_time={seconds}"],
        env={**os.environ, "DELTANET_BENCH_CPU_MODEL_DIR": str(directory)}, capture_output=True, text=True, check=True)
    names = {f"B:{b}/T:{t}": f"Prefill {b} x {t}" for b, t in PREFILL} | {f"N:{n}/real": f"Generate {n}" for n in GENERATE}
    tokens_per_second = {}
    for case in json.loads(output.stdout)["benchmarks"]:
        if case.get("error_occurred"):
            sys.exit(f"{case['name']}: {case['error_message']}")
        for part, name in names.items():
            if part in case["name"]:
                tokens_per_second[name] = case["tokens/s"]
    return tokens_per_second


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=root / "build" / "release" / "bin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case and round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"load average {os.getloadavg()[0]:.1f}, PyTorch {torch.__version__}, {arguments.threads} threads", flush=True)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as directory:
        check()
        directory = pathlib.Path(directory)
        subprocess.run([arguments.bin / "deltanet-client", "make-model", "--family=delta_net", "--d-model=2048",
                        "--num-layers=2", "--num-heads=16", "--intermediate-size=5632", "--vocab-size=32000",
                        f"--output={directory}"], check=True)
        model = load(directory)
        rounds = []
        for _ in range(arguments.rounds):
            rounds.append((pytorch(model, arguments.seconds), engine(arguments.bin, directory, arguments.seconds)))
        for case in rounds[0][0]:
            theirs, ours = (statistics.median(r[side][case] for r in rounds) for side in (0, 1))
            print(f"{case:16} PyTorch {theirs:9.1f} tokens/s   engine {ours:9.1f} tokens/s   {ours / theirs:5.2f} x")


if __name__ == "__main__":
    main()
