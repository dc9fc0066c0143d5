"""The suite: `python -m unittest` in the root of the checkout."""

import signal

# A shell's background job ignores SIGINT, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
