"""How the server's process ends: signals, drains, a lost device, exit statuses.

    process_test.py DELTANET_SERVER FAKE_SERVER

FAKE_SERVER is tests/e2e/fake_server.cc: the real server over a fake model, of which a step can be made to hang.
"""

import signal
import subprocess
import sys
import unittest
import urllib.error
import urllib.request

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

import programs
from deltanet.v1 import deltanet_pb2 as pb
from deltanet.v1 import deltanet_pb2_grpc

TIMEOUT = 60  # Seconds a call may take before the test fails.
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING

REQUEST = pb.ForwardRequest(
    input=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[2, 3], data=bytes(2 * 3 * 4)))


def reason_of(error):
    """The ErrorInfo's reason of a grpc.RpcError."""
    info = error_details_pb2.ErrorInfo()
    trailers = dict(error.trailing_metadata())
    status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details[0].Unpack(info)
    return info.reason


class ProcessTest(unittest.TestCase):
    def start(self, *flags, status=0):
        server = self.enterContext(programs.Server(fake_program, {"m": "fake"}, *flags, status=status))
        channel = self.enterContext(grpc.insecure_channel(server.address))
        self.stub = deltanet_pb2_grpc.DeltaNetServiceStub(channel)
        self.watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        self.assertEqual(next(self.watch).status, SERVING)
        return server

    def hold_a_call(self, server):
        call = self.stub.Forward.future(REQUEST, timeout=TIMEOUT)
        server.wait_for_log("held")
        return call

    def test_a_drain_finishes_what_runs_and_refuses_the_rest(self):
        server = self.start("--fake-hold=0")
        running = self.hold_a_call(server)
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(next(self.watch).status, NOT_SERVING)
        with self.assertRaises(grpc.RpcError) as raised:
            self.stub.Forward(REQUEST, timeout=TIMEOUT)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNAVAILABLE)
        self.assertEqual(reason_of(raised.exception), "DRAINING")
        with self.assertRaises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"http://{server.metrics_address}/readyz")
        self.assertEqual(raised.exception.code, 503)
        raised.exception.close()
        metrics = urllib.request.urlopen(f"http://{server.metrics_address}/metrics").read().decode()
        self.assertIn('deltanet_errors_total{reason="DRAINING"} 1\n', metrics)
        server.process.send_signal(signal.SIGUSR1)
        self.assertEqual(len(running.result().output.data), 2 * 8 * 4)
        self.assertEqual(server.process.wait(TIMEOUT), 0)
        self.assertIn("drained=true", server.wait_for_log("stopped"))

    def test_a_second_signal_ends_at_once(self):
        server = self.start("--fake-hold=0", status=-signal.SIGTERM)
        running = self.hold_a_call(server)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining")
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(server.process.wait(TIMEOUT), -signal.SIGTERM)
        with self.assertRaises(grpc.RpcError):
            running.result()

    def test_a_step_that_never_ends_does_not_keep_the_process(self):
        server = self.start("--fake-hold=0", "--drain-timeout=0s", status=4)
        self.hold_a_call(server)
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(server.process.wait(TIMEOUT), 4)

    def test_a_lost_device_ends_the_process_once_the_answers_are_out(self):
        server = self.start("--fake-lose-device=1", status=3)
        self.stub.Forward(REQUEST, timeout=TIMEOUT)
        with self.assertRaises(grpc.RpcError) as raised:
            self.stub.Forward(REQUEST, timeout=TIMEOUT)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.INTERNAL)
        self.assertEqual(reason_of(raised.exception), "INTERNAL")
        self.assertIn("the device is lost", raised.exception.details())
        self.assertEqual(next(self.watch).status, NOT_SERVING)
        self.assertEqual(server.process.wait(TIMEOUT), 3)
        self.assertIn("the device has fallen off the bus", server.wait_for_log("device_lost"))

    def test_a_device_lost_during_a_drain_does_not_cut_it_short(self):
        server = self.start("--fake-hold=0", "--fake-lose-device=0", status=3)
        running = self.hold_a_call(server)
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(next(self.watch).status, NOT_SERVING)
        server.process.send_signal(signal.SIGUSR1)
        with self.assertRaises(grpc.RpcError) as raised:
            running.result()
        self.assertIn("the device is lost", raised.exception.details())
        self.assertEqual(server.process.wait(TIMEOUT), 3)
        self.assertIn("drained=true", server.wait_for_log("stopped"))

    def test_what_cannot_be_parsed_is_refused_and_not_logged(self):
        server = self.start()
        bad = pb.ForwardRequest(request_id="NAME").SerializeToString().replace(b"NAME", b"\xff\xfe\xfd\xfc")
        channel = self.enterContext(grpc.insecure_channel(server.address))
        for request in (bad, b"\xff"):
            with self.assertRaises(grpc.RpcError):
                channel.unary_unary("/deltanet.v1.DeltaNetService/Forward")(request, timeout=TIMEOUT)
            stream = channel.stream_stream("/deltanet.v1.DeltaNetService/StreamForward")
            self.assertEqual(list(stream(iter([request]), timeout=TIMEOUT)), [])
        self.stub.Forward(REQUEST, timeout=TIMEOUT)
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(server.process.wait(TIMEOUT), 0)
        server.wait_for_log(" stopped ")
        listening, draining = (next(i for i, line in enumerate(server.log) if event in line)
                               for event in (" listening ", " draining "))
        self.assertEqual(server.log[listening + 1:draining], [])

    def test_a_start_that_fails_says_why(self):
        for flags, status, message in [
            (["--threads=many"], 2, '--threads is "many", want a whole number'),
            ([], 2, "--model is not given"),
            (["--model=m=/nowhere"], 1, "/nowhere"),
        ]:
            with self.subTest(flags=flags):
                ended = subprocess.run([server_program, *flags], stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
                self.assertEqual(ended.returncode, status, ended.stderr)
                self.assertIn(message, ended.stderr)
        server = self.start()
        ended = subprocess.run([fake_program, "--model=m=fake", f"--listen={server.address}"],
                               stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
        self.assertEqual(ended.returncode, 1, ended.stderr)
        self.assertIn(f"cannot listen for gRPC on {server.address}", ended.stderr)


if __name__ == "__main__":
    fake_program, server_program = sys.argv.pop(), sys.argv.pop()
    unittest.main()
