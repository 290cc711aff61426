"""fastdit: train Diffusion Transformers fast. The verbs are train.py, encode.py and sample.py; start with train.py."""
