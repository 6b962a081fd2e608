"""The reference of this folder against the golden cases: what is compared with the service is itself right.

    reference_test.py GOLDEN_DIRECTORY
"""

import pathlib
import sys
import unittest

import reference


class ReferenceTest(unittest.TestCase):
    def test_golden_cases(self):
        # The reference has the README's families alone, whose service it is compared with.
        cases = [case for case in sorted(golden.iterdir()) if not case.name.startswith("fla_")]
        self.assertGreaterEqual({case.name for case in cases},
                                {"transformer_deltanet", "transformer_block", "deltanet_model"})
        for case in cases:
            with self.subTest(case=case.name):
                tensors = reference.read_safetensors(case / "golden.safetensors")
                found = reference.Model(case)(tensors["input"][0])
                self.assertLess(reference.relative_error(found, tensors["output"][0]), 1e-6)


if __name__ == "__main__":
    golden = pathlib.Path(sys.argv.pop())
    unittest.main()
