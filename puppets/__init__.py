"""The embedded world: procedural heads and the small networks trained on them."""
