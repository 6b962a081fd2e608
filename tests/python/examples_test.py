"""The examples of client/examples run, and the README shows them as they are.

    examples_test.py SOURCE_DIRECTORY DELTANET_SERVER DELTANET_CLIENT STREAM_EXAMPLE
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import programs


class ExamplesTest(unittest.TestCase):
    def test_both_stream_a_whole_sequence(self):
        with tempfile.TemporaryDirectory() as directory:
            programs.make_model(client_program, f"{directory}/model", "transformer_deltanet", d_model=64, num_layers=6)
            with programs.Server(server_program, {"demo": f"{directory}/model"}) as server:
                for command in ([sys.executable, examples / "stream.py"], [stream_example]):
                    found = subprocess.run([*command, server.address], check=True, text=True, timeout=60,
                                           stdout=subprocess.PIPE).stdout
                    pieces = [tuple(map(int, piece)) for piece in re.findall(r"(\d+) outputs from position (\d+)", found)]
                    self.assertEqual(pieces[0], (10, 0), "16 tokens less the look-ahead of 6 layers")
                    self.assertEqual(sum(size for size, _ in pieces), 100)

    def test_the_readme_shows_them(self):
        readme = (source / "README.md").read_text()
        for name in ("stream.py", "stream.cc"):
            # Without the comment that says how to run it.
            shown = re.sub(r'\A(""".*?"""|(//[^\n]*\n)+)\s*', "", (examples / name).read_text(), flags=re.DOTALL)
            self.assertIn(shown, readme, name)

    def test_the_readme_names_every_flag_and_command(self):
        readme = (source / "README.md").read_text()
        for program, pattern in ((server_program, r"^  (--[a-z-]+)"), (client_program, r"^  ([a-z-]+) ")):
            help_text = subprocess.run([program, "--help"], check=True, text=True, stdout=subprocess.PIPE).stdout
            names = re.findall(pattern, help_text, re.MULTILINE)
            self.assertGreater(len(names), 5)
            for name in names:
                self.assertRegex(readme, rf"`{name}\b")


if __name__ == "__main__":
    stream_example, client_program, server_program, source = (sys.argv.pop() for _ in range(4))
    source = pathlib.Path(source)
    examples = source / "client" / "examples"
    unittest.main()
