"""Continues a prompt token by token, with stubs made from proto/ by grpcio-tools.

    generate.py HOST:PORT
"""

import sys

import grpc
from deltanet.v1 import deltanet_pb2 as pb, deltanet_pb2_grpc

stub = deltanet_pb2_grpc.DeltaNetServiceStub(grpc.insecure_channel(sys.argv[1]))
prompt = pb.TokenIds(ids=[1, 2, 3])
for reply in stub.Generate(pb.GenerateRequest(ids=prompt, max_tokens=8)):  # With a tokenizer: text="Once upon".
    for token in reply.tokens:
        print(token.id, end=" ", flush=True)  # With a tokenizer: reply.text.
print(f"\n{reply.usage.prompt_tokens} tokens in, {reply.usage.generated_tokens} out")
