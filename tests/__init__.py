"""The test suite: run `python -m unittest` in the root of the checkout."""

import os
import signal

# A shell's background job ignores SIGINT, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Precompiling torch's headers takes longer than compiling the few kernels of the tests.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
# Nor need torch compile, link and load a test program for each kind of vector instruction before it uses them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
