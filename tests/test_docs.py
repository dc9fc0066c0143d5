"""The examples in the docstrings run, and show what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import unittest

import torchbasics


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """The doctests of every module of the package, beside this file's own tests."""
    for module in pkgutil.iter_modules(torchbasics.__path__, "torchbasics."):
        tests.addTests(doctest.DocTestSuite(importlib.import_module(module.name)))
    return tests


class Doctests(unittest.TestCase):
    def test_those_that_are_expected_are_found(self) -> None:
        finder = doctest.DocTestFinder(exclude_empty=True)
        for name in ("data", "device", "early_stopping"):
            found = [test for test in finder.find(importlib.import_module(f"torchbasics.{name}")) if test.examples]
            self.assertTrue(found, name)


if __name__ == "__main__":
    unittest.main()
