"""A model and images -> scores, pictures, latents, statistics: what the training callback and the programs share."""
