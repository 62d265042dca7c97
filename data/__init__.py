"""Recordings in, datasets out: what `audio_to_images.py` and its siblings share."""
