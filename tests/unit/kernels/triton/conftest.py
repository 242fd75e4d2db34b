"""Which tests are for a process in which Triton interprets: test_interpreted.py starts it."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
