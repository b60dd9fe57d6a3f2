"""Evaluation of a model on images: scores, images, latents, statistics. Shared by the callbacks and the scripts."""
