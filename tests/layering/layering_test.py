"""Reads the #include lines of every room and keeps the walls between them.

Debian's packages put every header within reach of every target, so linking alone keeps no walls.

    layering_test.py SOURCE_DIRECTORY
"""

import pathlib
import re
import sys
import unittest

ROOMS = ("proto", "model", "server", "client")

PROJECT = r"(proto|model|server|client|tests)/"
GENERATED = r"deltanet/(v1|tokenizer)/|google/rpc/|google/protobuf/|grpc/health/"
GRPC = r"grpc(pp)?/|grpc\+\+/"
PROMETHEUS = r"prometheus/"
HTTP = r"httplib\.h"
JSON = r"nlohmann/"
TORCH = r"(ATen|c10|caffe2|torch)/"
CUDA = r"(cuda|cublas|cute/|cutlass/|nv|mma\.h)"
CLOCKS_AND_THREADS = r"(absl/time/clock\.h|chrono|thread|future|stop_token|pthread\.h)$"
DEBIAN_MUTEX = r"(absl/synchronization/|mutex$|shared_mutex$|condition_variable$)"

# Each rule: files (a regular expression over their paths), what they may not include, exceptions to that among the
# includes, files that are excepted, and why.
INCLUDE_RULES = [
    ("proto/", PROJECT, "(proto|model/base)/", (), "proto may use only model/base of the other rooms"),
    ("model/", PROJECT, "model/", (), "model knows of no other room"),
    ("model/base/", PROJECT, "model/base/", (), "model/base is at the bottom"),
    ("model/", f"{GENERATED}|{GRPC}|{PROMETHEUS}|{HTTP}", None, (), "model knows neither RPC nor metrics"),
    ("model/", CLOCKS_AND_THREADS, None, ("model/base/mutex.h",), "model has no clock and no threads of its own"),
    ("server/", PROJECT, "(proto|model|server)/", (), "server may use model and proto"),
    ("server/", "model/ops/", None, (), "server uses model by its front door"),
    ("client/", PROJECT, "(proto|model/base|client)/", (), "client may use proto and model/base"),
    ("client/", f"{PROMETHEUS}|{HTTP}", None, (), "metrics are the server's"),
    ("(proto|server|client|tests|model/base)/", f"{TORCH}|{CUDA}", None, (), "LibTorch and CUDA stay in model"),
    ("model/", TORCH, None,
     ("model/ops/gemm.cc", "model/device.cc", "model/torch_guard.cc", "model/torch_parallel.cc"),
     "LibTorch allocates and multiplies, behind gemm, device and torch_guard"),
    (r"model/.*\.(h|cc)$", CUDA, None, (), "CUDA headers belong into .cu files"),
    (r".*\.h$", JSON, None, ("model/base/json_handler.h",), "nlohmann/json is slow to compile: in .cc files only"),
    ("server/", r"(chrono|thread|future|absl/time/clock\.h)$", None,
     ("server/clock.cc", "server/executor.h", "server/executor.cc"), "time comes from clock, threads from executor"),
    ("(model|server|proto|client)/", DEBIAN_MUTEX, None, ("model/base/mutex.h",),
     "use model/base/mutex.h: TSan cannot see into Debian's absl::Mutex, Clang's analysis not into std::mutex"),
]

# As above, over the code without its comments and strings.
WORD_RULES = [
    ("(model|server|proto)/", r"absl::Now\b|\bstd::chrono\b|absl::GetCurrentTimeNanos\b",
     ("model/base/mutex.h", "server/clock.cc"),
     "time comes from clock"),
    ("(model|server|proto)/", r"absl::SleepFor\b|\bsleep_(for|until)\b|\b(u|nano)?sleep\(", (),
     "wait on a condition, not on a sleep"),
    ("(model|server|proto)/", r"\bstd::(j?thread|async)\b|\bpthread_create\b",
     ("server/executor.h", "server/executor.cc"), "threads come from executor"),
]

COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def violations(path, text):
    """What the file at `path` (from the root of the tree) does against the rules: a list of messages."""
    found = []
    for include in INCLUDE.findall(text):
        for files, forbidden, but, excepted, why in INCLUDE_RULES:
            if (re.match(files, path) and re.match(forbidden, include) and path not in excepted
                    and not (but and re.match(but, include))):
                found.append(f"{path} includes {include}: {why}")
    code = COMMENT_OR_STRING.sub(" ", text)
    for files, forbidden, excepted, why in WORD_RULES:
        match = re.search(forbidden, code)
        if match and re.match(files, path) and path not in excepted:
            found.append(f"{path} says {match.group(0)}: {why}")
    return found


class Tree(unittest.TestCase):
    def test_every_room_keeps_to_its_walls(self):
        found = []
        for room in ROOMS + ("tests",):
            files = [path for path in sorted((source / room).rglob("*")) if path.suffix in (".h", ".cc", ".cu")]
            self.assertTrue(files, f"{room}/ has no sources: is {source} the root of the tree?")
            for path in files:
                found += violations(path.relative_to(source).as_posix(), path.read_text())
        self.assertFalse(found, "\n" + "\n".join(found))


class Rules(unittest.TestCase):
    def test_finds_each_planted_violation(self):
        for path, text in [
            ("proto/wire.cc", '#include "server/clock.h"'),
            ("proto/wire.cc", '#include "model/model.h"'),
            ("model/model.h", '#include "server/clock.h"'),
            ("model/model.h", '#include "deltanet/v1/deltanet.pb.h"'),
            ("model/model.cc", "#include <grpcpp/grpcpp.h>"),
            ("model/model.cc", "  #  include <thread>"),
            ("model/base/config.cc", '#include "model/model.h"'),
            ("model/model.h", "#include <ATen/ATen.h>"),
            ("model/model.cc", "#include <torch/torch.h>"),
            ("model/ops/gemm.h", "#include <c10/core/Device.h>"),
            ("model/ops/delta_rule.cc", "#include <cuda_runtime.h>"),
            ("model/base/config.h", "#include <nlohmann/json.hpp>"),
            ("server/batcher.cc", "#include <torch/torch.h>"),
            ("server/batcher.cc", "#include <c10/util/Exception.h>"),
            ("server/batcher.cc", "#include <cuda_runtime.h>"),
            ("server/batcher.cc", '#include "model/ops/gemm.h"'),
            ("server/batcher.cc", '#include "client/client.h"'),
            ("server/batcher.cc", "#include <chrono>"),
            ("server/batcher.cc", '#include "absl/synchronization/mutex.h"'),
            ("server/batcher.cc", "#include <mutex>"),
            ("server/batcher.cc", "void F() { absl::SleepFor(absl::Seconds(1)); }"),
            ("server/batcher.cc", "absl::Time t = absl::Now();"),
            ("server/batcher.cc", "std::thread thread_;"),
            ("server/batcher.cc", "std::this_thread::sleep_for(s);"),
            ("model/model.cc", "std::async(f);"),
            ("client/main.cc", '#include "server/server.h"'),
            ("client/main.cc", '#include "model/model.h"'),
            ("client/main.cc", "#include <prometheus/registry.h>"),
            ("tests/e2e/e2e_test.cc", "#include <torch/torch.h>"),
        ]:
            with self.subTest(path=path, text=text):
                self.assertTrue(violations(path, text))

    def test_lets_pass_what_is_allowed(self):
        for path, text in [
            ("proto/wire.h", '#include "model/base/tensor_view.h"'),
            ("model/model.h", '#include "model/base/tensor_view.h"\n#include <vector>'),
            ("model/ops/gemm.cc", "#include <ATen/ATen.h>"),
            ("model/ops/delta_rule_cuda.cu", "#include <cuda_runtime.h>"),
            ("model/base/config.cc", "#include <nlohmann/json.hpp>"),
            ("model/base/mutex.h", "#include <mutex>\n#include <condition_variable>"),
            ("server/executor.h", "#include <thread>\nstd::thread thread_;"),
            ("server/clock.cc", "#include <chrono>\nstd::chrono::steady_clock::now();"),
            ("server/batcher.cc", '#include "model/model.h"\n// Never absl::Now().\nLog("std::thread");'),
            ("client/main.cc", '#include "deltanet/v1/deltanet.pb.h"\n#include "model/base/safetensors.h"'),
            ("tests/server/batcher_test.cc", "#include <thread>"),
        ]:
            with self.subTest(path=path, text=text):
                self.assertEqual(violations(path, text), [])


if __name__ == "__main__":
    source = pathlib.Path(sys.argv.pop())
    unittest.main()
