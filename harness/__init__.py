"""What every script needs and no network: command lines, run folders, pictures, tables."""
