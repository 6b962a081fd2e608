"""Streams a sequence chunk by chunk, with stubs made from proto/ by grpcio-tools.

    stream.py HOST:PORT
"""

import sys

import grpc
import numpy as np
from deltanet.v1 import deltanet_pb2 as pb, deltanet_pb2_grpc

x = np.random.default_rng(0).standard_normal((100, 64), np.float32)  # [T, d_model]


def requests(chunk=16):
    for begin in range(0, len(x), chunk):
        part = x[begin : begin + chunk]
        yield pb.StreamForwardRequest(
            input=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=part.shape, data=part.tobytes()),
            end_of_sequence=begin + chunk >= len(x))


stub = deltanet_pb2_grpc.DeltaNetServiceStub(grpc.insecure_channel(sys.argv[1]))
for reply in stub.StreamForward(requests()):
    if reply.HasField("error"):
        sys.exit(reply.error.message)
    y = np.frombuffer(reply.output.data, np.float32).reshape(reply.output.shape)
    print(f"{len(y)} outputs from position {reply.output_position} on")
