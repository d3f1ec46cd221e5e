"""Parity with Hugging Face: run transformers and the engine on the same tokens and compare every named intermediate."""
