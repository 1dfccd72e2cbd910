"""Encode once: latents and text features of picture shards, resumable, on one process, many ranks or Ray."""
