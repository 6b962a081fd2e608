#!/usr/bin/env python3
"""The docker-compose deployment from end to end: images built, the stack started from nothing, used, stopped, killed.

    tests/docker/stack_test.py

Wants a Docker engine, docker-compose (1.29 or v2) and Python's standard library. Where no registry can be reached the base
image is made locally and Prometheus comes from Debian's package. Everything runs under a project name of its own, on free
ports of 127.0.0.1, and is removed at the end, but for images.
"""
import contextlib
import datetime
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = f"deltanet-test-{os.getpid()}"
IMAGE = "deltanet-test:cpu"
MIB = 1 << 20


class Failure(Exception):
    pass


def check(condition, message):
    if not condition:
        raise Failure(message)


def run(*command, status=0, timeout=300, stderr=subprocess.STDOUT, **options):
    """Runs a command to its end; its exit status is `status`, or anything where that is None."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=stderr, text=True,
                          timeout=timeout, **options)
    check(status is None or done.returncode == status,
          f"{' '.join(map(str, command))}: exit status {done.returncode}, want {status}\n{done.stdout[-4000:]}"
          f"{done.stderr or ''}")
    return done


def wait_until(what, condition, timeout):
    """Until condition() is true; returns what it returned. An error while asking means: not yet."""
    end = time.monotonic() + timeout
    while True:
        last = None
        try:
            last = condition()
            if last:
                return last
        except (OSError, ValueError, Failure) as error:
            last = error
        check(time.monotonic() < end, f"waited {timeout} s in vain for: {what} (last: {last})")
        time.sleep(0.2)


@contextlib.contextmanager
def step(what):
    begin = time.monotonic()
    print(f"{what} ...", flush=True)
    yield
    print(f"  ok, {time.monotonic() - begin:.1f} s", flush=True)


class Stack:
    def __init__(self, files):
        version_2 = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
        self.compose_command = ["docker", "compose"] if version_2 else ["docker-compose"]
        self.compose_command += ["-p", PROJECT]
        for file in files:
            self.compose_command += ["-f", DEPLOY / file]
        # A port left out: the engine picks a free one.
        self.environment = {**os.environ, "DELTANET_IMAGE": IMAGE, "DELTANET_PUBLISH": "127.0.0.1:",
                            "PROMETHEUS_PUBLISH": "127.0.0.1:"}

    def compose(self, *arguments, **options):
        return run(*self.compose_command, *arguments, env=self.environment, **options)

    def start_client(self, *arguments):
        return subprocess.Popen(
            list(map(str, [*self.compose_command, "run", "--rm", "-T", "client", *arguments])),
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def client(self, *arguments):
        return self.compose("run", "--rm", "-T", "client", *arguments).stdout

    def container(self, service):
        # By its labels: `docker-compose ps` of version 2 leaves out those that have ended.
        labels = {"project": PROJECT, "service": service, "oneoff": "False"}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        return run("docker", "ps", "-aq", *filters).stdout.strip()

    def inspect(self, service):
        return json.loads(run("docker", "inspect", self.container(service)).stdout)[0]

    def healthy(self, service):
        return self.inspect(service)["State"].get("Health", {}).get("Status") == "healthy"

    @functools.cached_property
    def prometheus_address(self):
        return self.compose("port", "prometheus", 9090).stdout.strip().splitlines()[-1]

    def prometheus(self, path, **parameters):
        url = f"http://{self.prometheus_address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            answer = json.load(response)
        check(answer["status"] == "success", f"{url}: {answer}")
        return answer["data"]

    def value(self, query):
        """The one value of a query, or None."""
        result = self.prometheus("query", query=query)["result"]
        return float(result[0]["value"][1]) if result else None

    def server_metric(self, name):
        """The sum of the server's series of a name, asked of itself."""
        networks = self.inspect("server")["NetworkSettings"]["Networks"]
        with urllib.request.urlopen(f"http://{next(iter(networks.values()))['IPAddress']}:9464/metrics", timeout=5) as response:
            text = response.read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(name + r"[{ ]", line))


def have_image(name):
    return (subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode == 0
            or subprocess.run(["docker", "pull", "--quiet", name], capture_output=True).returncode == 0)


def test_image():
    """What the image is and holds."""
    inspected = json.loads(run("docker", "image", "inspect", IMAGE).stdout)[0]
    config = inspected["Config"]
    print(f"  {inspected['Size'] / 1e6:.0f} MB")
    check(inspected["Size"] < 700e6, f"the image has {inspected['Size']} bytes, want less than 700 MB")
    check(config["User"] == "65534:65534", f"the user is {config['User']!r}")
    check(config["StopSignal"] == "SIGTERM", f"the stop signal is {config.get('StopSignal')!r}")
    version = run("docker", "run", "--rm", IMAGE, "--version").stdout.split()[-1]
    label = config["Labels"]["org.opencontainers.image.version"]
    check(version == label, f"the label says version {label}, the program {version}")

    container = run("docker", "create", IMAGE).stdout.strip()
    listing = subprocess.run(f"docker export {container} | tar -t", shell=True, check=True, capture_output=True, text=True).stdout
    run("docker", "rm", container)
    held = {name for name in re.findall(r"^usr/lib/x86_64-linux-gnu/(.+)$", listing, re.M)}
    loaded = set()
    for program in ("deltanet-server", "deltanet-client"):
        text = run("docker", "run", "--rm", "--entrypoint", "/lib64/ld-linux-x86-64.so.2", IMAGE, "--list",
                   f"/usr/bin/{program}").stdout
        check("not found" not in text, f"{program} misses libraries:\n{text}")
        loaded |= set(re.findall(r"/x86_64-linux-gnu/(\S+)", text))
    check(held == loaded, f"held and not loaded: {sorted(held - loaded)}; loaded and not held: {sorted(loaded - held)}")
    programs = set(re.findall(r"^usr/bin/(.+)$", listing, re.M))
    check(programs == {"deltanet-server", "deltanet-client"}, f"the programs are {sorted(programs)}")
    for licence in (r"libgrpc[^/]*/copyright", r"libc6/copyright", r"torch-[^/]*/.*LICENSE", r"nvidia_cuda_runtime-[^/]*/.*",
                    r"deltanet/LICENSE"):
        check(re.search(f"^usr/share/doc/{licence}$", listing, re.M), f"no licence {licence}")


def test_start_that_fails(stack):
    """A wrong flag, a model that is not there or cannot be read, a port in use: the last line says it."""

    def expect(exit_status, pattern, *arguments, options=()):
        done = run("docker", "run", "--rm", *options, IMAGE, *arguments, status=None)
        line = done.stdout.strip().splitlines()[-1]
        print(f"  {done.returncode}: {line}")
        check(done.returncode == exit_status, f"exit status {done.returncode}, want {exit_status}:\n{done.stdout}")
        check(re.search(pattern, line), f"the last line does not say {pattern!r}")

    expect(2, r"unknown flag --no-such-flag", "--no-such-flag")
    expect(2, r"--model is not given", options=["--env", "DELTANET_MODEL"])
    expect(2, r"DELTANET_THREADS is \"many\", want a whole number", "--model", "demo=/model",
           options=["--env", "DELTANET_THREADS=many"])
    expect(1, r"ERROR failed .*/model/config.json: No such file", "--model", "demo=/model")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o700)
        expect(1, r"ERROR failed .*/model/config.json: Permission denied", "--model", "demo=/model",
               options=["--volume", f"{directory}:/model:ro"])
    expect(1, r"ERROR failed .*cannot listen for gRPC on 0.0.0.0:50051", "--model", "demo=/model", "--metrics-listen",
           "127.0.0.1:0", options=["--network", f"container:{stack.container('server')}", "--volumes-from",
                                   f"{stack.container('server')}:ro"])


def test_first_up(stack):
    """The stack comes up by itself, with a model, confined as the file says."""
    check(stack.inspect("model")["State"]["ExitCode"] == 0, "the service that makes a model failed")
    wait_until("the server is healthy", lambda: stack.healthy("server"), 60)
    wait_until("Prometheus is healthy", lambda: stack.healthy("prometheus"), 60)
    wait_until("Prometheus reads the server", lambda: stack.value('up{job="deltanet"}') == 1, 30)
    server = stack.inspect("server")
    check(server["HostConfig"]["ReadonlyRootfs"], "the server's root file system can be written")
    check(server["HostConfig"]["CapDrop"] == ["ALL"], f"capabilities dropped: {server['HostConfig']['CapDrop']}")
    check(not next(mount for mount in server["Mounts"] if mount["Destination"] == "/model")["RW"], "the model can be written")
    # Sized by the container's limit, not by the machine.
    capacity = stack.value("sum((deltanet_sessions + deltanet_sessions_free) * deltanet_session_bytes)")
    check(capacity is not None and 0 < capacity <= 1024 * MIB, f"states may take {capacity} bytes, want at most a quarter of 4 GiB")
    # Again: nothing is made anew.
    text = stack.compose("run", "--rm", "-T", "model").stdout
    check("left as it is" in text, f"the model was made again: {text}")


def test_clients(stack):
    """A one-shot and a streaming client on the stack's network agree, and Prometheus saw them."""
    server = ("--server", "server:50051")
    stack.client("health", *server)
    stack.client("make-input", "--shape", "4,96,64", "--output", "x.safetensors")
    stack.client("forward", *server, "--input", "x.safetensors", "--output", "one-shot.safetensors")
    stack.client("stream", *server, "--input", "x.safetensors", "--output", "streamed.safetensors", "--chunk", "16,1,7")
    print("  " + stack.client("compare", "--a", "one-shot.safetensors", "--b", "streamed.safetensors").strip().splitlines()[-1])
    bad = stack.compose("run", "--rm", "-T", "client", "forward", *server, "--model", "nobody", "--input", "x.safetensors",
                        "--output", "y.safetensors", status=1).stdout
    check("MODEL_NOT_FOUND" in bad, f"a wrong model name is answered with: {bad}")
    stack.client("bench", *server, "--sessions", "16", "--duration", "10s")
    for query in ('deltanet_requests_total{method="Forward", code="OK"} >= 1',
                  'deltanet_requests_total{method="StreamForward", code="OK"} >= 1',
                  'deltanet_stream_messages_total{code="OK"} >= 13',
                  'deltanet_errors_total{reason="MODEL_NOT_FOUND"} >= 1',
                  "deltanet_tokens_total >= 768"):
        wait_until(query, lambda: stack.value(query) is not None, 20)


def test_stop_during_work(stack):
    """SIGTERM while a stream and a long call run: the call is finished, the stream told, the exit clean; the alert fires."""
    server = ("--server", "server:50051")
    stack.client("make-input", "--shape", "1,200000,64", "--output", "long.safetensors")
    before = stack.server_metric("deltanet_stream_messages_total")
    stream = stack.start_client("stream", *server, "--input", "long.safetensors", "--output", "z.safetensors", "--chunk", "1")
    wait_until("the stream runs", lambda: stack.server_metric("deltanet_stream_messages_total") > before, 30)

    def tokens_of_calls():
        # A message of the stream is one token.
        return stack.server_metric("deltanet_tokens_total") - stack.server_metric("deltanet_stream_messages_total")

    tokens = tokens_of_calls()
    call = stack.start_client("forward", *server, "--input", "long.safetensors", "--output", "z1.safetensors")
    wait_until("the call runs", lambda: tokens_of_calls() > tokens + 1000, 60)
    # As `docker-compose stop` does, but at once: the call lasts seconds.
    run("docker", "stop", stack.container("server"), timeout=60)
    output = stream.communicate(timeout=60)[0]
    told = re.search(r".*UNAVAILABLE \(DRAINING\).*", output)
    check(stream.returncode == 1 and told, f"the stream ended with {stream.returncode}: {output}")
    print("  the stream: " + told[0])
    output = call.communicate(timeout=60)[0]
    check(call.returncode == 0, f"the call was cut off: {output}")
    print("  the call: " + output.strip().splitlines()[-1])
    state = stack.inspect("server")["State"]
    check(state["ExitCode"] == 0, f"the server's exit status is {state['ExitCode']}, want 0")
    draining, stopped = run("docker", "logs", stack.container("server")).stdout.strip().splitlines()[-2:]
    check(" draining " in draining and "stopped drained=true" in stopped, f"the server's last lines are: {draining}; {stopped}")
    seconds = [datetime.datetime.fromisoformat(line.split("Z ")[0]).timestamp() for line in (draining, stopped)]
    print(f"  the drain: {seconds[1] - seconds[0]:.3f} s")
    check(seconds[1] - seconds[0] > 0.02, "nothing ran when the server was stopped: this tested nothing")

    def firing():
        return [alert["labels"]["alertname"] for alert in stack.prometheus("alerts")["alerts"] if alert["state"] == "firing"]

    check("DeltaNetServerDown" not in firing(), "the alert fired at once")
    wait_until("the alert that the server is down", lambda: "DeltaNetServerDown" in firing(), 120)
    stack.compose("start", "server")
    wait_until("the server is healthy", lambda: stack.healthy("server"), 60)
    wait_until("no alert", lambda: not firing(), 60)


def test_kill(stack):
    """kill -9: Docker starts it again, and the metrics say so."""
    started = stack.value("process_start_time_seconds")
    # Seen from the host: nothing inside a container can kill its first process.
    run("docker", "run", "--rm", "--pid", "host", "--entrypoint", "/bin/sh", "debian:bookworm-slim", "-c",
        f"kill -9 {stack.inspect('server')['State']['Pid']}")
    wait_until("a restart", lambda: stack.inspect("server")["RestartCount"] == 1, 30)
    wait_until("the server is healthy", lambda: stack.healthy("server"), 60)
    wait_until("a new start in the metrics", lambda: stack.value("process_start_time_seconds") > started, 30)
    check(stack.value("changes(process_start_time_seconds[15m])") >= 1, "no start is counted")
    stack.client("health", "--server", "server:50051")


def test_generation(files):
    """A model of one's own, mounted from a directory, that generates; Prometheus saw it."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        stack = Stack(files)
        stack.environment |= {"DELTANET_MODEL_DIR": directory, "DELTANET_MODEL_NAME": "language"}
        stack.compose("run", "--rm", "-T", "--user", f"{os.getuid()}:{os.getgid()}", "model", "make-model", "--family",
                      "delta_net", "--d-model", "64", "--num-layers", "2", "--num-heads", "2", "--vocab-size", "100",
                      "--output", "/model")
        stack.compose("up", "-d", "--no-build", "server")
        wait_until("the server is healthy", lambda: stack.healthy("server"), 60)
        server = ("--server", "server:50051")
        # A rate wants the counters as they were before, too.
        wait_until("Prometheus reads the new server",
                   lambda: stack.value('deltanet_generated_tokens_total{model="language"}') is not None, 30)
        greedy = [stack.compose("run", "--rm", "-T", "client", "generate", *server, "--ids", "1,2,3", "--max-tokens", "8",
                                stderr=subprocess.PIPE) for _ in range(2)]
        ids = greedy[0].stdout.split()
        print(f"  1 2 3 -> {' '.join(ids)}")
        check(len(ids) == 8 and all(0 <= int(id) < 100 for id in ids), f"want 8 ids below 100, found {ids}")
        check(greedy[1].stdout.split() == ids, f"the most likely tokens, again: {greedy[1].stdout}")
        check("finished by length: prompt 3 tokens, generated 8" in greedy[0].stderr, f"the summary: {greedy[0].stderr}")
        stack.client("bench", *server, "--generate", "--concurrency", "4", "--seconds", "10", "--prompt-tokens", "16",
                     "--output-tokens", "32")
        for query in ('deltanet_requests_total{method="Generate", code="OK"} > 2',
                      'deltanet_generations_finished_total{model="language", reason="length"} > 2',
                      'deltanet_prompt_tokens_total{model="language"} > 6',
                      'deltanet_generated_tokens_total{model="language"} > 16',
                      'deltanet_time_to_first_token_seconds_count{model="language"} > 2',
                      'deltanet_time_per_output_token_seconds_count{model="language"} > 14',
                      'deltanet_generations_running{model="language"} == 0'):
            wait_until(query, lambda: stack.value(query) is not None, 20)


def test_tls(files):
    """The TLS override, with certificates made as its comment says: who trusts them is served, nobody in the clear."""
    comment = (DEPLOY / "docker-compose.tls.yaml").read_text()
    lines = re.search(r"#   mkdir .*\n(?:#   .*\n)+", comment)[0].replace("#   ", "")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        stack = Stack([*files, "docker-compose.tls.yaml"])
        stack.environment["DELTANET_TLS_DIR"] = directory
        run("bash", "-ec", lines, env=stack.environment)
        stack.compose("up", "-d", "--no-build", "server")
        wait_until("the server is healthy", lambda: stack.healthy("server"), 60)
        stack.client("health", "--server", "server:50051", "--tls-ca", "/tls/ca.pem")
        refused = stack.compose("run", "--rm", "-T", "client", "health", "--server", "server:50051", status=1).stdout
        check("UNAVAILABLE" in refused, f"a client without TLS is told: {refused}")


def test_queries(stack, begin):
    """Every query of the alerts and the dashboard had values while this test ran, but for those of a GPU."""
    gpu_metrics = {"deltanet_device_memory_bytes", "deltanet_device_memory_free_bytes"}
    queries = []
    for group in stack.prometheus("rules")["groups"]:
        for rule in group["rules"]:
            # Its value, whether it exceeds its bound or not.
            queries.append((rule["name"], re.sub(r" (==|!=|>=|<=|>|<) (?=[0-9])", r" \1 bool ", rule["query"])))
    rules = len(queries)
    dashboards = list((DEPLOY / "monitoring/grafana/dashboards").glob("*.json"))
    for path in dashboards:
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"] + dashboard["annotations"]["list"]:
            for target in panel.get("targets", [panel] if "expr" in panel else []):
                query = target["expr"].replace("$__rate_interval", "20s")
                queries.append((panel.get("title") or panel["name"], re.sub(r"\$(instance|model)", ".*", query)))
    check(rules and len(queries) > rules, f"{rules} rules, {len(queries) - rules} queries of {len(dashboards)} dashboards")
    for title, query in queries:
        result = stack.prometheus("query_range", query=query, start=begin, end=time.time(), step=5)["result"]
        found = any(value != "NaN" for series in result for _, value in series["values"])
        names = set(re.findall(r"\bdeltanet_\w+", query))
        of_gpu = bool(names) and names <= gpu_metrics
        check(found != of_gpu, f"{title}: {'' if found else 'no '}values of {query}")
    print(f"  {rules} alerts, {len(queries) - rules} queries of the dashboard")


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # By way of the `finally` below.
    files = ["docker-compose.yaml"]
    prometheus = re.search(r"image: (prom/prometheus:\S+)", (DEPLOY / files[0]).read_text())[1]
    if not have_image(prometheus):
        files.append("docker-compose.debian.yaml")
        prometheus = "deltanet-prometheus:debian"
    stack = Stack(files)
    begin = time.time()
    try:
        with step("base image"):
            print("  " + (run(DEPLOY / "docker/local_base.sh", timeout=600).stdout.strip() or "is there"))
        with step("build"):
            stack.compose("build", timeout=1800)
        with step("image"):
            test_image()
        with step("alert rules"):
            run("docker", "run", "--rm", "--volume", f"{DEPLOY}/monitoring:/monitoring:ro", "--workdir", "/monitoring",
                "--entrypoint", "promtool", prometheus, "test", "rules", "alerts_test.yml")
        with step("up"):
            stack.compose("up", "-d", timeout=300)
            test_first_up(stack)
        with step("clients"):
            test_clients(stack)
        with step("starts that fail"):
            test_start_that_fails(stack)
        with step("stop during work"):
            test_stop_during_work(stack)
        with step("kill"):
            test_kill(stack)
        with step("generation"):
            test_generation(files)
        with step("TLS"):
            test_tls(files)
        with step("queries"):
            test_queries(stack, begin)
    except (Failure, subprocess.SubprocessError) as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        print(stack.compose("logs", "--tail", "20", "model", "server", status=None).stdout, file=sys.stderr)
        return 1
    finally:
        stack.compose("down", "--volumes", "--remove-orphans", status=None)
    print("all steps passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
