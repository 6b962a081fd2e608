"""The examples of client/examples run, and the README shows them as they are, with all that there is to set and to watch.

    examples_test.py SOURCE_DIRECTORY DELTANET_SERVER DELTANET_CLIENT STREAM_EXAMPLE
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
import urllib.request

import programs


class ExamplesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        directory = cls.enterClassContext(tempfile.TemporaryDirectory())
        programs.make_model(client_program, f"{directory}/model", "transformer_deltanet", d_model=64, num_layers=6)
        cls.server = cls.enterClassContext(programs.Server(server_program, {"demo": f"{directory}/model"}))
        cls.readme = (source / "README.md").read_text()

    def test_both_stream_a_whole_sequence(self):
        for command in ([sys.executable, examples / "stream.py"], [stream_example]):
            found = subprocess.run([*command, self.server.address], check=True, text=True, timeout=60,
                                   stdout=subprocess.PIPE).stdout
            pieces = [tuple(map(int, piece)) for piece in re.findall(r"(\d+) outputs from position (\d+)", found)]
            self.assertEqual(sum(size for size, _ in pieces), 100)
            self.assertIn(found, self.readme)

    def test_the_readme_shows_them(self):
        for name in ("stream.py", "stream.cc"):
            # Without the comment that says how to run it.
            shown = re.sub(r'\A(""".*?"""|(//[^\n]*\n)+)\s*', "", (examples / name).read_text(), flags=re.DOTALL)
            self.assertIn(shown, self.readme, name)

    def test_the_readme_names_every_flag_command_and_metric(self):
        with urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics", timeout=60) as reply:
            metrics = reply.read().decode()
        for text, pattern in (
            (self.help_of(server_program), r"^  (--[a-z-]+)"),
            (self.help_of(client_program), r"^  ([a-z-]+) "),
            (metrics, r"^# TYPE deltanet_(\w+) "),
        ):
            names = re.findall(pattern, text, re.MULTILINE)
            self.assertGreater(len(names), 5)
            self.assertEqual([name for name in names if not re.search(rf"`{name}\b", self.readme)], [])

    def help_of(self, program):
        return subprocess.run([program, "--help"], check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    stream_example, client_program, server_program, source = (sys.argv.pop() for _ in range(4))
    source = pathlib.Path(source)
    examples = source / "client" / "examples"
    unittest.main()
