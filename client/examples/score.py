"""How likely each id of a sequence is after those before it, with stubs made from proto/ by grpcio-tools.

    score.py HOST:PORT
"""

import sys

import grpc
import numpy as np
from deltanet.v1 import deltanet_pb2 as pb, deltanet_pb2_grpc

ids = np.array([1, 2, 3, 4, 5], np.int64)
stub = deltanet_pb2_grpc.DeltaNetServiceStub(grpc.insecure_channel(sys.argv[1]))
reply = stub.Forward(pb.ForwardRequest(
    input=pb.Tensor(dtype=pb.DATA_TYPE_INT64, shape=ids.shape, data=ids.tobytes()),
    output_options=pb.OutputOptions(kind=pb.OUTPUT_SCORES)))
for scored, log_prob in zip(ids[reply.output_position:], reply.log_probs):
    print(f"{scored}: {log_prob:.2f}")
print(f"perplexity {np.exp(-np.mean(reply.log_probs)):.0f}")
