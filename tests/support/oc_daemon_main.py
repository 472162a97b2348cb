"""`python -m controller oc-daemon` with other bounds than the measured ones: OC_TEST_BOUNDS is a JSON object."""

from __future__ import annotations

import json
import os
import sys

from controller import config, log
from controller.oc import supervise
from controller.oc.upkeep import Bounds

if __name__ == "__main__":
    log.configure(as_json=True, level="INFO")
    bounds = Bounds(**json.loads(os.environ["OC_TEST_BOUNDS"]))
    sys.exit(supervise.run(config.load_daemon(), bounds=bounds))
