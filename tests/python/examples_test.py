"""The examples of client/examples run, and the README shows them as they are, with all that there is to set and to watch.

    examples_test.py SOURCE_DIRECTORY DELTANET_SERVER DELTANET_CLIENT STREAM_EXAMPLE GENERATE_EXAMPLE SCORE_EXAMPLE
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
        programs.make_model(client_program, f"{directory}/lm", "delta_net", d_model=64, num_layers=2, num_heads=2,
                            vocab_size=1000)
        cls.language_server = cls.enterClassContext(programs.Server(server_program, {"lm": f"{directory}/lm"}))
        cls.server = cls.enterClassContext(programs.Server(server_program, {"demo": f"{directory}/model"}))
        cls.readme = (source / "README.md").read_text()

    def test_both_stream_a_whole_sequence(self):
        for command in ([sys.executable, examples / "stream.py"], [stream_example]):
            found = self.output_of(*command, self.server.address)
            pieces = [tuple(map(int, piece)) for piece in re.findall(r"(\d+) outputs from position (\d+)", found)]
            self.assertEqual(sum(size for size, _ in pieces), 100)
            self.assertIn(found, self.readme)

    def test_both_generate_and_score_alike(self):
        for name, program in (("generate", generate_example), ("score", score_example)):
            python = self.output_of(sys.executable, examples / f"{name}.py", self.language_server.address)
            self.assertEqual(python, self.output_of(program, self.language_server.address))
            self.assertIn(python.replace(" \n", "\n"), self.readme)

    def test_the_command_line_does_what_the_readme_shows(self):
        def pieces(text):  # Text and numbers by turns.
            return re.split(r"(-?\d+\.\d+)", text)

        for arguments in ("generate --ids 1,2,3 --max-tokens 8", "score --ids 1,2,3,4,5"):
            found = pieces(self.output_of(client_program, *arguments.split(), "--server", self.language_server.address))
            shown = self.readme.partition(f"$ deltanet-client {arguments}\n")[2]
            shown = pieces(re.split(r"^(?:\$|```|finished by)", shown, flags=re.MULTILINE)[0])
            self.assertEqual(found[::2], shown[::2])
            for one, other in zip(map(float, found[1::2]), map(float, shown[1::2])):
                self.assertAlmostEqual(one / other, 1, delta=1e-3)

    def test_the_readme_shows_them(self):
        for name in ("stream.py", "stream.cc", "generate.py", "score.py"):
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
        return self.output_of(program, "--help")

    def output_of(self, *command):
        return subprocess.run(command, check=True, text=True, timeout=60, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    score_example, generate_example, stream_example, client_program, server_program, source = (
        sys.argv.pop() for _ in range(6))
    source = pathlib.Path(source)
    examples = source / "client" / "examples"
    unittest.main()
