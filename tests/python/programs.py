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
    """A deltanet-server on free ports of 127.0.0.1. Ends with the `with` block, by SIGTERM; its exit status is checked."""

    def __init__(self, program, models, *flags, status=0):
        self.status = status
        self.logged = threading.Condition()
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
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()

    def read_log(self):
        for line in self.process.stderr:
            with self.logged:
                self.log.append(line)
                self.logged.notify_all()

    def wait_for_log(self, text, timeout=60):
        """Returns the first line with `text`, once it is there."""
        found = lambda: next((line for line in self.log if text in line), None)
        with self.logged:
            if not self.logged.wait_for(found, timeout):
                raise RuntimeError(f"the log has no {text!r}:\n{''.join(self.log)}")
            return found()

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
        if status != self.status:
            raise RuntimeError(f"the server ended with {status}, want {self.status}:\n{''.join(self.log)}")

    def resident_bytes(self):
        statm = pathlib.Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def anonymous_bytes(self):
        """What is resident and of no file: heaps and stacks, not libraries."""
        rollup = pathlib.Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return int(re.search(r"^Anonymous:\s+(\d+) kB$", rollup, re.MULTILINE).group(1)) * 1024
