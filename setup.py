from setuptools import setup

setup()  # the settings are in setup.cfg
