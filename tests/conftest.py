"""What holds for all tests; set before the libraries that read it are imported."""

import os

# No test may depend on a network: hub ids that are not cached are refused at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Networks are tiny: threads would wait for each other longer than they compute.
os.environ["OMP_NUM_THREADS"] = "1"

from prior_fixtures import (  # noqa: F401
    copy,
    folder,
    lora,
    plus,
    prior,
    sd2,
    sd2_folder,
    taesd,
    taesd_folder,
)
from run_fixtures import copied, finished  # noqa: F401
from video_fixtures import ending  # noqa: F401
