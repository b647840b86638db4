"""The teacher: class prompts scored on regions of images by a generative captioner."""
