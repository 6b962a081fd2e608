"""Runs the two programs as a user would."""

import os
import pathlib
import re
import signal
import subprocess
import threading


def make_model(client, directory, family, **settings):
    """Writes a random model with `deltanet-client make-model`; num_layers=3 becomes --num-layers=3."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    subprocess.run([client, "make-model", f"--family={family}", f"--output={directory}", *flags], check=True,
                   stdout=subprocess.DEVNULL)


class Server:
    """A deltanet-server on free ports of 127.0.0.1. Ends with the `with` block, by SIGTERM; that it exits with 0 is checked."""

    def __init__(self, program, models, *flags):
        arguments = [program, "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", *flags]
        arguments += [f"--model={name}={directory}" for name, directory in models.items()]
        self.process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(r" listening host=(\S+) port=(\d+) metrics_host=(\S+) metrics_port=(\d+)", line):
                self.address, self.metrics_address = (":".join(match.group(i, i + 1)) for i in (1, 3))
                break
        else:
            raise RuntimeError(f"the server ended with {self.process.wait()} before it listened:\n{''.join(self.log)}")
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(60)
        finally:
            self.process.kill()
            self.reader.join()
            self.process.stderr.close()
        if status != 0:
            raise RuntimeError(f"the server ended with {status}, want 0:\n{''.join(self.log)}")

    def resident_bytes(self):
        statm = pathlib.Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
