"""No test may depend on a network: hub ids that are not cached are refused at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # Read when huggingface_hub is first imported.
