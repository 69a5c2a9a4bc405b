"""The training of the embedded checkpoints, a file per part; pretrain.py is the command."""
