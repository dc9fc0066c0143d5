"""Saves that are cut short or fail, and checkpoints that are not as they were written."""
from .runs import Row
def killed_in_a_save(row): pass
def failing_saves(row): pass
def damaged(row): pass
def foreign(row): pass
